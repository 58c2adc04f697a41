"""introduction.txt in a run's folder: the text before the first turn of the conversations that the run was trained on.

Questions to a tuned model begin with the same text, see docs/models/mplug_chat.md, "Conversations". The file holds the text and a line
break; an empty line says that there is no introduction.
"""

from etils import epath

from ymplug_jax.core.checkpoint_files import BEST
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import conversation
from ymplug_jax.data.source import open_split
from ymplug_jax.training import run_folder
from ymplug_jax.training.setup import Run
from ymplug_jax.training.stop import reading

FILE = "introduction.txt"


def write(run: Run, workdir: epath.Path, start: int) -> None:
    """Find and write the introduction at the start of a run, on one process. A resumed run keeps what it has.

    Args:
      run: the prepared run; nothing is written unless its task has conversations.
      workdir: folder of the run.
      start: number of finished steps.

    Raises:
      PlaceFailed: the data cannot be read.
    """
    file, data = workdir / FILE, run.experiment.data
    if run.task.introduction is None or (start and file.exists()):
        return
    with reading(data.path):
        text = run.task.introduction(open_split(data.path, data.train_split))
    workdir.mkdir(parents=True, exist_ok=True)
    run_folder.write_whole(file, f"{text}\n".encode())
    if (workdir / BEST / run_folder.CONFIG).exists():  # of a version without this file
        copy(workdir, workdir / BEST)


def copy(workdir: epath.Path, target: epath.Path) -> None:
    """Copy the file to another run's folder, if there is one."""
    if (workdir / FILE).exists():
        run_folder.write_whole(target / FILE, (workdir / FILE).read_bytes())


def read(workdir: epath.Path) -> str:
    """The introduction of a run's conversations, that of published weights if the run has none; "" for no introduction.

    Raises:
      Mistake: the file is damaged.
    """
    file = workdir / FILE
    if not file.exists():
        return conversation.SYSTEM
    fix = "restore a copy, or write the text there that stands before the first turn of the training's conversations, and a line break"
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise Mistake(f"{file}: damaged, not UTF-8; {fix}") from None
    except OSError as error:
        raise Mistake(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from None
    if not text.endswith("\n"):
        raise Mistake(f"{file}: damaged, does not end with a line break; {fix}")
    text = text[:-1]
    if len(conversation.pieces(f"\n{text}\n")) > 1:
        raise Mistake(f"{file}: holds turns or placeholders; {fix}")
    return text
