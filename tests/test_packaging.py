"""What is published is whole: addresses, classifiers and every folder that the pages speak of."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_index_is_told_where_the_project_lives() -> None:
    urls = PROJECT["project"]["urls"]
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= set(urls)
    assert all(url.startswith("https://") for url in urls.values())


def test_the_oldest_python_is_the_first_of_the_classifiers() -> None:
    versions = [re.search(r"Python :: (3\.\d+)$", entry) for entry in PROJECT["project"]["classifiers"]]
    named = [match[1] for match in versions if match]
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"
    assert named == [f"3.{11 + number}" for number in range(len(named))]


def test_the_sdist_holds_every_folder_and_page() -> None:
    include = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all((ROOT / name).exists() for name in include)
    pages = set(re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {page.split("/")[0] for page in pages} <= set(include)


def test_files_of_the_package_that_are_no_code_are_known() -> None:
    """The wheel takes whatever lies in the package's folder; a new kind of file there is noticed here."""
    files = {
        path.suffix for path in (ROOT / "fisherkit").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == {".py", ".txt", ".typed"}
