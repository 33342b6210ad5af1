"""What a run may find out about a model that changes how it is run: no errors, for somebody above acts on them."""


class Unreplayable(Exception):  # noqa: N818 - a finding
    """The blocks of this model cannot be run one by one: another engine is chosen. The message completes a sentence."""


class NeedsBatchSizeOne(Exception):  # noqa: N818 - a finding
    """A target cannot be squared per sample inside a batch; ``general`` names parameters to leave to autograd."""

    def __init__(self, general: frozenset[str]) -> None:
        super().__init__()
        self.general = general
