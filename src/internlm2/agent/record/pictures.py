"""Pictures of a run as files."""

from pathlib import Path

from internlm2 import files
from internlm2.agent.record.events import Event, result_of

_ENDINGS = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif", "image/webp": "webp"}


class PictureSaver:
    """Writes the pictures that tools make into a folder, as call_3-0.png; it is a listener of a session.

    Raises ExportError when one is there already, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, event: Event) -> None:
        """Save the pictures of a result; other events are none of its business."""
        if event["event"] != "result":
            return
        result = result_of(event)
        for n, picture in enumerate(result.pictures):
            path = self._folder / f"{result.call.id}-{n}.{_ENDINGS.get(picture.media_type, 'bin')}"
            with files.writing(path):
                files.check_new(path)
            files.write_bytes(path, picture.data)
