"""Layouts of whole folders: each a `Checkpoint`, and a way to write it where there is one."""
