"""The README.md of a model made of two: front matter that the Hub reads, what was done, and the tuned model's own card.

YAML is written and read by hand, since no YAML library is a dependency: written as plain or double-quoted scalars, read
as far as the few fields go that are carried over. Standard library only.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from fisherkit.checkpoint.hub import ModelSource

PAPERS: Mapping[str, str] = {"fapm": "https://arxiv.org/abs/2509.08255"}
"""Where the method is described, by its name."""

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
_PLAIN = re.compile(r"[A-Za-z][\w./-]*", re.ASCII)
_RESERVED = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"))
_HUB_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?", re.ASCII)
_CACHED = re.compile(r"models--(.+)")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
_LICENSE = ("license", "license_name", "license_link")
_CARRIED = (*_LICENSE, "pipeline_tag")


def public_id(source: ModelSource) -> str:
    """What to call a model in public: its id on the Hub, or the name of its folder or file; never a path."""
    for part in source.path.absolute().parts:
        cached = _CACHED.fullmatch(part)
        if cached is not None:
            return cached[1].replace("--", "/")
    return source.id if source.revision is not None else Path(source.path).resolve().name


def read_card(folder: Path | None) -> str | None:
    """The README.md of a model folder; None where there is none, or none that is text."""
    try:
        return (folder / "README.md").read_text(encoding="utf-8") if folder is not None else None
    except (OSError, UnicodeDecodeError):
        return None


def redact(command: Sequence[str]) -> str:
    """A command line as one would type it, without the tokens of the Hub in it."""
    words, secret = [], False
    for word in command:
        shown = _TOKEN.sub("hf_REDACTED", re.sub(r"^(--(?:hf-)?token=).*", r"\1REDACTED", word))
        words.append("REDACTED" if secret else shown)
        secret = word in ("--token", "--hf-token")
    return _text(shlex.join(words))


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
    """The card, in Markdown with YAML front matter.

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
        "library_name": ["transformers"],
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


def front_matter(card: str) -> dict[str, list[str]]:
    """The fields of a card's front matter that are carried over, each as its values; empty where there are none."""
    found = _FRONT.match(card)
    fields: dict[str, list[str]] = {}
    key = ""
    for line in found[1].splitlines() if found else ():
        entry = re.match(r"([A-Za-z_]\w*):(?:\s+(.*))?$", line)
        item = re.match(r"\s*-\s+(.*)$", line)
        if entry is not None:
            key = entry[1]
            fields[key] = _values(entry[2] or "")
        elif item is not None and key:
            fields[key] += _values(item[1])
    return {key: fields[key] for key in _CARRIED if fields.get(key)}


def _values(text: str) -> list[str]:
    """A scalar, or a list in brackets; without quotes and comments."""
    text = text.strip()
    if text.startswith("["):
        return [value for part in text.strip("[]").split(",") for value in _values(part)]
    quoted = re.match(r"""(["'])(.*?)\1\s*(?:#.*)?$""", text)
    plain = quoted[2] if quoted else re.sub(r"(?:^|\s)#.*$", "", text).strip()
    return [plain] if plain and plain not in ("|", ">", "null", "~") else []


def _front(fields: Mapping[str, Sequence[str]]) -> str:
    lines = ["---"]
    for key, values in fields.items():
        if key in ("base_model", "tags") or len(values) > 1:
            lines += [f"{key}:", *(f"- {_scalar(value)}" for value in values)] if values else []
        else:
            lines.append(f"{key}: {_scalar(values[0])}")
    return "\n".join([*lines, "---", ""])


def _scalar(text: str) -> str:
    """One line of YAML that reads back as this text."""
    if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    return '"' + "".join(map(_escaped, _text(text))) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    return char if char.isprintable() else f"\\U{ord(char):08x}"


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
    """Text that UTF-8 can hold: a byte of a file name or an argument that is no text becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _inline(text: str) -> str:
    """A name inside of a line of Markdown."""
    return " ".join(_text(text).split()).replace("`", "'")


def _cell(text: str) -> str:
    return " ".join(_text(text).split()).replace("|", "\\|")
