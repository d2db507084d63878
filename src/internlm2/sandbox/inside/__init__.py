"""What runs on the far side of the wall: standard library only, imported by a bare `python -I -S`.

launch -> supervise (pid 1, trusted) -> worker or session (the untrusted code) and checker (the tests).
"""
