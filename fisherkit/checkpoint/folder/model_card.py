"""README.md of a model made of two: front matter that the Hub reads, what was done, and the tuned model's own card."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from fisherkit.checkpoint.hub import ModelSource

PAPERS: Mapping[str, str] = {"fapm": "https://arxiv.org/abs/2509.08255"}
"""Papers that describe a method, by its name."""

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_CACHED = re.compile(r"models--(.+)")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
_LICENSE = ("license", "license_name", "license_link")
_CARRIED = (*_LICENSE, "pipeline_tag")


def public_id(source: ModelSource) -> str:
    """Return what to call a model in public: its id on the Hub, or the name of its folder or file; never a path."""
    for part in source.path.absolute().parts:
        cached = _CACHED.fullmatch(part)
        if cached is not None:
            return cached[1].replace("--", "/")
    return source.id if source.revision is not None else Path(source.path).resolve().name


def read_card(folder: Path | None) -> str | None:
    """Read the README.md of a model folder; None where there is none, or none that is text."""
    try:
        return (folder / "README.md").read_text(encoding="utf-8") if folder is not None else None
    except (OSError, UnicodeDecodeError):
        return None


def redact(command: Sequence[str]) -> str:
    """Return a command line as one would type it, without the tokens of the Hub and the folders of this machine in it.

    A path that says where on a machine something lies (absolute, or upwards from where the command ran) is published as
    its last name; a relative one stands as it was typed.
    """
    words, secret = [], False
    for word in command:
        shown = _TOKEN.sub("hf_REDACTED", re.sub(r"^(--(?:hf-)?token=).*", r"\1REDACTED", word))
        words.append("REDACTED" if secret else public_path(shown))
        secret = word in ("--token", "--hf-token")
    return _text(shlex.join(words))


def public_path(word: str) -> str:
    """Return a word of a command line, or an option's value, with no more of a path than may be published."""
    option, given, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = PurePath(value)
    outside = path.is_absolute() or value.startswith("~") or ".." in path.parts
    return option + given + (path.name or value if outside else value)


def model_card(
    *,
    method: str,
    base_id: str,
    tuned_id: str | None,
    command: Sequence[str],
    facts: Mapping[str, str],
    base_card: str | None = None,
    tuned_card: str | None = None,
) -> str:
    """Return the card, in Markdown with YAML front matter.

    The licence is BASE's, or else the tuned model's, as their cards state it; it is never made up. The task
    (``pipeline_tag``) is the tuned model's.

    Args:
        method: ``fapm`` or ``merge``.
        base_id: public name of BASE, see public_id.
        tuned_id: public name of the tuned model or adapter; None where there is none.
        command: the command line as a list of words.
        facts: rows of the table of figures.
        base_card: README.md of BASE.
        tuned_card: README.md of the tuned side; its text is appended.
    """
    ours, theirs = front_matter(base_card or ""), front_matter(tuned_card or "")
    ids = [base_id, *([tuned_id] if tuned_id else [])]
    owner = ours if "license" in ours else theirs
    fields = {
        "library_name": "transformers",
        "base_model": [name for name in ids if _HUB_ID.fullmatch(name)],
        "tags": list(dict.fromkeys(("fisherkit", method, "merge"))),
        **{key: owner[key] for key in _LICENSE if key in owner},
        **{key: theirs[key] for key in ("pipeline_tag",) if key in theirs},
    }
    parts = [_front(fields), _body(method, base_id, tuned_id, redact(command), facts)]
    previous = _FRONT.sub("", tuned_card or "", count=1).strip()
    if previous:
        parts.append(f"---\n\n*The card of {_inline(tuned_id or base_id)} follows.*\n\n{previous}\n")
    return "\n".join(parts)


def front_matter(card: str) -> dict[str, str | list[str]]:
    """Return the fields of a card's front matter that are carried over; none where it is missing or no YAML."""
    import yaml  # a tenth of a second that only cards need

    match = _FRONT.match(card)
    try:
        # BaseLoader leaves scalars as text (a licence called "no" is no boolean) and makes nothing but text, lists and
        # mappings. The faster CBaseLoader crashes on deeply nested brackets instead of raising RecursionError.
        fields = yaml.load(match[1], Loader=yaml.BaseLoader) if match is not None else None  # noqa: S506
    except (yaml.YAMLError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        return {}
    known = {key: _words(fields.get(key)) for key in _CARRIED}
    return {key: words if len(words) > 1 else words[0] for key, words in known.items() if words}


def _words(value: object) -> list[str]:
    """Return a scalar or a list of scalars as words; none for null and for what is nested."""
    parts = value if isinstance(value, list) else [value]
    words = [part for part in parts if isinstance(part, str) and part not in ("", "null", "~")]
    # JSON, which is YAML too, escapes a character beyond the first 65,536 as two surrogates: make them one character.
    return [word.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for word in words]


def _front(fields: Mapping[str, object]) -> str:
    """Write fields as front matter, without those that are empty."""
    import yaml

    known = {key: value for key, value in fields.items() if value}
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=float("inf"))
    return f"---\n{text}---\n"


def _body(method: str, base_id: str, tuned_id: str | None, command: str, facts: Mapping[str, str]) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    paper = f" ([FAPM]({PAPERS[method]}))" if method in PAPERS else ""
    made = f"{_inline(base_id)} and {_inline(tuned_id)}" if tuned_id else _inline(base_id)
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items()]
    return "\n".join(
        (
            f"# {_inline(base_id)}, {method}\n",
            f"Made of {made} by `fisherkit {method}`{paper}.\n",
            f"{fence}sh\n{command}\n{fence}\n",
            *(("| | |", "|---|---|", *rows, "") if rows else ()),
            "Load it as any other model:\n",
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n",
            'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")',
            "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n```\n",
        )
    )


def _text(text: str) -> str:
    """Return text that UTF-8 can hold: a byte of a file name or an argument that is no text becomes "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _inline(text: str) -> str:
    """Return a name as it stands inside of a line of Markdown."""
    return " ".join(_text(text).split()).replace("`", "'")


def _cell(text: str) -> str:
    return " ".join(_text(text).split()).replace("|", "\\|")
