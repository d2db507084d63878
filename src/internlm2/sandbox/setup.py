"""What the host asks for, and what was put up.

NOTE: `SimpleNamespace` and not dataclasses, here and in the modules beside this one: `dataclasses`, `pathlib` and
`contextlib` would take a third of the time that a sandbox needs to start.
"""

from types import SimpleNamespace


class Setup(SimpleNamespace):
    """kind: "program" or "session". folder: the private folder on the host, also the mount point of the new root.
    readable: absolute paths that stay readable. without: protections left out (tests of the protections only).
    import_folders: what is put on sys.path.
    """

    kind: str
    folder: str
    readable: list[str]
    import_folders: list[str]
    environment: dict[str, str]
    without: list[str]
    wall_seconds: float
    cpu_seconds: float
    memory_bytes: int
    num_processes: int
    file_bytes: int
    disk_bytes: int


class Wall(SimpleNamespace):
    """What was really put up on this machine; told to the host in the report."""

    namespaces: bool = False
    own_root: bool = False
    own_proc: bool = False
    own_user: int | None = None
    landlock: bool = False
    filter: bool = False
    why_not: str = ""
