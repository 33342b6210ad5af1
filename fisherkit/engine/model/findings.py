"""Findings about a model that change how it is run. They are no errors: ``extract`` catches them and acts on them."""


class Unreplayable(Exception):  # noqa: N818 - a finding
    """Blocks of this model cannot be run one by one: another engine is chosen. The message completes a sentence."""


class NeedsBatchSizeOne(Exception):  # noqa: N818 - a finding
    """A target cannot be squared per sample inside a batch; ``general`` names parameters to leave to autograd."""

    def __init__(self, general: frozenset[str]) -> None:
        super().__init__()
        self.general = general


class AttendsAhead(Exception):  # noqa: N818 - a finding
    """Tokens see the ones after them, so that labels leak into what predicts them."""


class FoundInModel(Exception):  # noqa: N818 - a finding
    """One of the findings above, about one of several models that are run together.

    Attributes:
        number: of the model.
        finding: what was found.
    """

    def __init__(self, number: int, finding: Unreplayable | NeedsBatchSizeOne | AttendsAhead) -> None:
        super().__init__()
        self.number, self.finding = number, finding
