"""The packages import what docs/architecture.md says, and nothing else."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "app" / "quern"


def documented() -> dict[str, set[str]]:
    """Package or module to what it may import, from the table."""
    rows = re.findall(r"^\| `([a-z_]+)(?:/|\.py)` \|.*\|([^|]*)\|$", (ROOT / "docs/architecture.md").read_text(), re.M)
    return {name: set(re.findall(r"`([a-z_]+)`", cell)) for name, cell in rows}


def imported() -> dict[str, set[str]]:
    """Package or module to what it imports of the others."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        owner = parts[0] if len(parts) > 1 else path.stem
        names = found.setdefault(owner, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "quern":
                whole = [node.module] if node.module != "quern" else [f"quern.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                whole = [alias.name for alias in node.names if alias.name.startswith("quern.")]
            else:
                continue
            names |= {str(name).split(".")[1] for name in whole} - {owner, "__version__"}
    return {owner: names for owner, names in found.items() if owner != "__init__"}


def test_the_page_names_every_package() -> None:
    assert documented().keys() == imported().keys()


def test_packages_import_what_the_page_says() -> None:
    assert imported() == documented()
