"""The evaluation of a tiny chat model: predictions agree with the training loss, with single rows and with changed media."""

import jax
import numpy as np
import pytest
from etils import epath

import chat
import shards
from conversations import Held
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.exits import Mistake
from ymplug_jax.reports import evaluation_report
from ymplug_jax.tasks.common import preprocess
from ymplug_jax.tasks.mplug_chat import answering, questions
from ymplug_jax.training.evaluate import Scorer

OPTIONS = {"new_tokens": 4, "choices": 3, "choice_tokens": 12}
ROWS = Held([
    chat.talk("a", ("clip",), [("红色", "圆形")], 1)._replace(task_type="shape_sft"),
    chat.talk("b", ("image", "clip"), [("红色", "在移动"), ("绿色", "方形在移动")], 100)._replace(task_type="shape_sft"),
    chat.talk("c", (), [("黄色", "圆形")])._replace(task_type="text_sft", options=("圆形", "方形")),
    chat.talk("d", ("image",), [], 300),
    chat.talk("e", ("image",), [("蓝色", "圆形")], 400)._replace(task_type="shape_sft"),
])  # fmt: skip


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory):
    """(run, parameters, scores, report) of one evaluation in batches of four."""
    tokenizer = str(shards.tokenizer(tmp_path_factory.mktemp("chat") / "t.model"))
    run = chat.prepare(tokenizer, model=chat.MODEL, partition="adapters_abstractor", options=OPTIONS)
    params = jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, jax.jit(run.task.init)(jax.random.key(0)))
    trainable, frozen = state_lib.split(params, run.frozen_patterns)
    scores, report = Scorer(run).score(ROWS, trainable, frozen, 0, 7)
    return run, params, scores, report


def test_the_right_option_has_the_likelihood_of_the_training_loss(scored) -> None:
    run, params, _, report = scored
    rows = {row["index"]: row for row in report.rows}
    assert list(rows) == [0, 1, 2, 4]
    held = questions.Questions(ROWS, 3)
    views = questions.views(held)
    assert rows[0]["options"] == sorted(["圆形", "方形在移动"]) and rows[2]["options"] == ["圆形", "方形"]
    losses = jax.jit(lambda batch: run.task.loss(params, batch, None)[1]["loss"])
    for index, name in ((0, ""), (0, "black"), (0, "other"), (4, ""), (4, "other"), (2, "")):
        record, row = views[name][index], rows[index]
        batch = chat.batch_of(run, [(record,)] * 4, valid=np.array([True, False, False, False]))
        loss = losses(batch)
        place = row["options"].index(row["references"][0])
        key = f"likelihood/{name}" if name else "likelihood"
        assert row[key][place] == pytest.approx(-float(loss.total), rel=1e-4)
        assert row["option_tokens"][place] == int(loss.weight)
    assert rows[0]["likelihood"] != rows[0]["likelihood/black"] != rows[0]["likelihood/other"] != rows[0]["likelihood"]
    assert rows[0]["other_media"] == ["clip110"] and rows[4]["other_media"] in (["image100"], ["image300"])


def test_answers_of_a_padded_batch_are_those_of_single_rows(scored) -> None:
    run, params, _, report = scored
    example = run.task.one(questions.Questions(ROWS, 3)[1], None)
    width = int(example["prompt_mask"].sum())
    assert example["asked"] and width < chat.LENGTH
    for key in ("prompt_ids", "prompt_index", "prompt_mask"):
        example[key] = example[key][-width:]  # no padding at all
    batch = {key: value[None] for key, value in (example | {"valid": np.bool_(True)}).items()}
    single = jax.device_get(jax.jit(run.task.predict)(params, batch))
    row = next(row for row in report.rows if row["index"] == 1)
    tokenizer = preprocess.tokenizer_for(run.experiment.data, 64)
    assert answering.text_of(single["generated"][0], tokenizer) == row["answer"] != ""
    np.testing.assert_allclose(single["likelihood"][0, :2], row["likelihood"], rtol=1e-4)


def test_the_scores_have_controls_and_the_page_is_written(scored, tmp_path) -> None:
    run, _, scores, report = scored
    assert (scores["examples"], scores["questions"], scores["text_only"], scores["without_answer"]) == (5, 4, 1, 1)
    assert {"exact", "exact/media", "exact/black", "exact/other", "exact/majority", "choice/uniform"} <= scores.keys()
    assert scores["exact/majority"] == 2 / 3 and set(scores["kinds"]) == {"shape", "text"} and scores["loss"] > 0
    known = {score.name for score in run.task.scores}
    assert {name for name, value in scores.items() if isinstance(value, float)} <= known
    with pytest.raises(
        Mistake, match=r"^config.train.best: neither a high nor a low 'exact/black' is better; choose one of exact, "
    ):
        run.task.score_named("exact/black")
    path = epath.Path(tmp_path) / "report.html"
    evaluation_report.write(path, scores, report.rows, ROWS, known=run.task.scores, page=run.task.page)
    html = path.read_text()
    assert "black frames" in html and "Options by kind of question" in html
