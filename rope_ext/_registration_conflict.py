"""Which other library has registered operators torch.ops.rope.*, for the ImportError about it."""

import re
from pathlib import Path

from rope_ext._torch_private import define_namespace, registered_operators, registrations_of


def registered_by(own: str) -> str:
    """The source files and libraries that have registered operators rope::*.

    own: the compiled part that could not register its own operators.
    """
    of_rope = [name for name in registered_operators() if name.startswith("rope::")]
    found = [registrations_of(name) for name in of_rope]
    try:
        define_namespace("DEF", "rope", "", __file__, 0)
    except RuntimeError as error:  # for a namespace that is taken, it names the source file
        found.append(str(error).partition("; latest registration")[0])
    places = {p for text in found for p in re.findall(r"(?:debug:|was) registered at (.+)", text)}
    return ", ".join([*sorted(places), *sorted(_loaded_copies() - {str(Path(own).resolve())})])


def _loaded_copies() -> set[str]:
    """Libraries of this process with the file name of rope_ext's compiled part, or librope.so.

    None on macOS, where a process can't read a list of its libraries from a file.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return set()
    files = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if "/" in line}
    return {file for file in files if re.search(r"/(rope_ext/_C\.[^/]*|librope)\.so", file)}
