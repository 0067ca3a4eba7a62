"""The optional rooms of this copy of the package, and which module imports which, as its files say."""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHOLE = (
    "callbacks/observe",
    "compression",
    "data/sets",
    "deployment",
    "metrics/probes",
    "models/kernels",
    "models/zoo",
    "tuning",
)
"""Optional folders. The core is everything else."""


class House:
    """A copy of the package.

    Args:
        package: folder of the package, an absolute path.
    """

    def __init__(self, package: Path) -> None:
        self.package = package
        techniques = sorted(path.parent.name for path in package.glob("compression/*/__init__.py"))
        rooms = [f"compression/{name}" for name in techniques]
        rooms += [
            "deployment/benchmark",
            "deployment/int8",
            "deployment/packed",
            "models/kernels",
            "models/zoo",
            "tuning",
            "callbacks/observe",
            "data/sets",
            "metrics/probes",
        ]
        self.rooms = [room for room in rooms if (package / room).is_dir()]
        """Folders that may be taken out one by one."""
        self.modules = {self._name(path): path for path in sorted(package.rglob("*.py"))}
        self.imports = {name: set(self.imports_of(path)) - {name} for name, path in self.modules.items()}
        """For each module, the modules of the package that it imports, inside functions too."""

    def _name(self, path: Path) -> str:
        return ".".join(path.relative_to(self.package.parent).with_suffix("").parts).removesuffix(".__init__")

    def imports_of(self, path: Path, *, late: bool = True) -> Iterator[str]:
        """Modules of the package that a file imports; not those that only the type checker sees.

        Args:
            path: a Python file, of the package or from elsewhere.
            late: whether imports inside functions count.
        """
        tree = ast.parse(path.read_text(encoding="utf-8"))
        unseen = {
            id(child)
            for node in ast.walk(tree)
            if (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
            or (not late and isinstance(node, ast.FunctionDef))
            for statement in node.body
            for child in ast.walk(statement)
        }
        for node in ast.walk(tree):
            if id(node) in unseen:
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                while name and name not in self.modules:
                    name = name.rpartition(".")[0]
                if name:
                    yield name

    def is_in(self, module: str, rooms: Sequence[str]) -> bool:
        """Whether a module lies in one of the rooms."""
        package = self.package.name
        return any(f"{module}.".startswith(f"{package}.{room.replace('/', '.')}.") for room in rooms)

    def with_all_that_need(self, rooms: Sequence[str]) -> list[str]:
        """The rooms, and every other optional room that imports one of them, directly or through others."""
        gone = list(rooms)
        while True:
            more = [
                other
                for other in (*self.rooms, *(room for room in WHOLE if (self.package / room).is_dir()))
                if other not in gone
                and any(
                    self.is_in(user, [other]) and not self.is_in(user, gone) and any(self.is_in(b, gone) for b in used)
                    for user, used in self.imports.items()
                )
            ]
            more = [room for room in more if not any(room != other and other.startswith(f"{room}/") for other in more)]
            if not more:
                return gone
            gone += more
