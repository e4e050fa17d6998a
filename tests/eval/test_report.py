"""The page of a run, from files as a run leaves them."""

import json
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megavlm.eval import report
from megavlm.eval.report import write_report
from megavlm.eval.run import EVALUATION_FILE
from megavlm.eval.scores import Score
from megavlm.train.events import EVENTS_FILE
from megavlm.train.metrics import METRICS_FILE
from megavlm.train.stragglers import RANKS_FILE
from tests.runs import plan_of


class Page(HTMLParser):
    """Tags with their attributes, and the text of each kind of tag."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.texts, self._open = [], {}, ""
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = tag

    def handle_data(self, data):
        if data.strip():
            self.texts.setdefault(self._open, []).append(data.strip())

    def all(self, tag, **attributes):
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]


@pytest.fixture
def plan(tiny_run):
    run = replace(tiny_run, train=replace(tiny_run.train, steps=5))
    tiny_run.run_folder.mkdir(parents=True)
    return plan_of(
        replace(run, objectives={"mim": 0.5, "contrastive": 1.0}),
        replace(run, train=replace(run.train, frozen=("encoder",))),
        replace(run, objectives={"instruction": 1.0}),
    )


def write_metrics(plan, steps):
    """Lines as training has written them up to a step."""
    lines = []
    for stage in plan.stages:
        common = {"stage": stage.name}
        both = {"_mim": 0.7, "_contrastive": 2.5} if "mim" in stage.run.objectives else {}
        for step in range(stage.first_step, min(steps, stage.end_step)):
            losses = {f"loss{name}": v for name, v in {"": 3.0, **both}.items()}
            losses |= {"gradient_norm": 1.0, "learning_rate": 1e-3, "samples_per_second": 9.0}
            lines.append({**common, "step": step, "samples": 8, "skipped_samples": 1, **losses})
        for step in (stage.first_step, stage.end_step):
            if step <= steps and stage.first_step < steps:
                losses = {f"heldout_loss{n}": v - step / 10 for n, v in {"": 3.0, **both}.items()}
                lines.append({**common, "step": step, "last": step > stage.first_step, **losses})
    path = plan.first.run_folder / METRICS_FILE
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_evaluation(plan, stage, scores, rows):
    folder = plan.first.run_folder
    path = folder / EVALUATION_FILE
    found = json.loads(path.read_text()) if path.is_file() else {}
    found[stage.name] = {"step": stage.end_step, "scores": [asdict(score) for score in scores]}
    path.write_text(json.dumps(found))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"predictions-{stage.name}.jsonl").write_text(lines)


def answer_of(sample, answer, truth="a red square", split="heldout"):
    turn = {"prompt": "Caption:", "answer": truth, "pictures": [0]}
    text = {"turns": [turn], "task": "caption", "kind": "en"}
    return {"split": split, "sample": sample, "text": text, "answer": answer}


def page_of(plan):
    path = write_report(plan, Path("runs/x.yaml"))
    assert path == plan.first.run_folder / "report.html"
    page = Page(path.read_text())
    # It stands by itself, and says in words what it shows.
    assert all(a["src"].startswith("data:image/jpeg;base64,") for a in page.all("img"))
    assert all(a["alt"] for a in page.all("img"))
    assert all(a["aria-label"] for a in page.all("svg", role="img"))
    assert len(page.all("svg", role="img")) == len(page.all("svg"))
    assert not page.all("link") and not page.all("script")
    named = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(named)) == len(named)
    return page


def test_what_is_shown_of_many_is_spread_over_all():
    assert report._spread("abcdefghi", 5) == ["a", "b", "d", "f", "h"]
    assert report._spread("ab", 5) == ["a", "b"]
    assert report._spread("", 5) == []


def test_a_run_that_has_not_begun(plan):
    page = page_of(plan)
    names = ["mim_contrastive", "captioning", "instruction"]
    assert [t for t in page.texts["b"] if t in names] == names
    assert page.texts["span"][:3] == ["to come"] * 3
    assert "encoder" in page.texts["dd"]  # frozen in the second stage
    assert not page.all("table") and not page.all("h2") and len(page.all("svg")) == 1
    assert not page.all("code")


def test_a_run_in_its_second_stage(plan):
    write_metrics(plan, steps=7)
    page = page_of(plan)
    assert page.texts["span"][:3] == ["done", "under way", "to come"]
    assert page.texts["h2"] == ["Stage mim_contrastive", "Stage captioning"]
    assert "7 of 15 steps" in " ".join(page.texts["p"][0].split())
    assert "7 bad samples" in page.texts["p"][0]
    assert len(page.all("svg")) == 3
    # Held out, before the first stage and after it, each objective by itself.
    assert len(page.all("table")) == 1
    assert [t for t in page.texts["th"] if t in ("weighted sum", "mim", "contrastive")] == [
        "weighted sum",
        "mim",
        "contrastive",
    ]
    numbers = page.texts["td"] + page.texts["b"][3:]
    assert sorted(numbers) == ["0.200", "0.700", "2.000", "2.500", "2.500", "3.000"]


def test_scores_and_pictures(plan):
    write_metrics(plan, steps=15)
    pretraining, captioning, instruction = plan.stages
    recall = Score(
        split="heldout",
        measure="text to picture, recall@1",
        items=1234,
        model=0.75,
        baselines={"chance": 0.125, "untrained": 0.25},
    )
    found = {0: "a <b>red</b> square", 1: "a green square", 8: "a <b>red</b> square"}
    rows = [
        {"split": "heldout", "sample": sample, "text": text, "best_samples": [8, 1]}
        for sample, text in found.items()
    ]
    write_evaluation(plan, pretraining, [recall], rows)
    caption = Score(split="heldout", measure="caption, en, CIDEr", items=3, model=5.5)
    write_evaluation(plan, captioning, [caption], [answer_of(0, "shown in no sheet")])
    rows = [
        answer_of(0, "a red square "),
        answer_of(1, "<i>nothing</i>", truth="a green square"),
        answer_of(0, "not of this split", split="heldout_questions"),
    ]
    write_evaluation(plan, instruction, [caption], rows)
    page = page_of(plan)
    content = (plan.first.run_folder / "report.html").read_text()

    columns = [a for a in page.all("th", scope="col")]
    assert {"chance", "untrained"} <= set(page.texts["th"]) and columns
    assert {"1,234", "0.125", "0.250"} <= set(page.texts["td"]) and "0.750" in page.texts["b"]

    shown = [(a["alt"], a.get("class")) for a in page.all("img") if ":" in a["alt"]]
    red = ("right: a <b>red</b> square", "right")
    # Samples 0 and 8 have the same caption, so either finds the other rightly.
    wrong_red, green = ("wrong: a <b>red</b> square", None), "a green square"
    right_green, wrong_green = (f"right: {green}", "right"), (f"wrong: {green}", None)
    assert shown == [red, wrong_green, wrong_red, right_green, red, wrong_green]

    assert "megavlm serve runs/x.yaml" in page.texts["code"]
    assert "Held-out pictures, as stage instruction sees them" in page.texts["h2"]
    assert len(page.all("li", class_="card")) == 2
    assert page.texts["span"].count("right:") == page.texts["span"].count("wrong:") == 1
    assert "(a green square)" in page.texts["span"]
    assert "shown in no sheet" not in content and "not of this split" not in content
    assert "<i>nothing</i>" not in content  # what a model says is never markup


def test_where_the_time_went(plan):
    write_metrics(plan, steps=5)
    folder = plan.first.run_folder
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    lines[2]["skipped_step"], lines[2]["loss"] = 1, None
    for line in lines:
        if "loss" in line:
            line |= {"step_seconds": 2.0, "data_seconds": 0.5, "text_tokens_per_second": 1234.5}
            line |= {"model_flops_per_second": 4e14, "model_flops_utilisation": 0.4125}
            line |= {"process_rss_bytes": 3 * 2**30}
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    began = {"process_started_unix_seconds": 1000.0}
    events = [
        {"event": "start", "unix_seconds": 1010.0, **began},
        {"event": "steps", "unix_seconds": 1060.0, "first": 0, "stop": 2, "seconds": 40.0},
        {"event": "step_skipped", "unix_seconds": 1070.0, "step": 2, "seconds": 10.0},
        {"event": "bad_step", "unix_seconds": 1080.0, "step": 3, "seconds": 10.0},
        {"event": "rolled_back", "unix_seconds": 1080.0, "from": 3, "to": 3, "left_out": [[6, 8]]},
        {"event": "damaged", "unix_seconds": 1080.0, "message": "file <x> is missing"},
        {"event": "recovered", "unix_seconds": 1080.0, "step": 3, "on_disk": 2, "seconds": 0.0},
        {"event": "steps", "unix_seconds": 1100.0, "first": 3, "stop": 5, "seconds": 20.0},
    ]
    (folder / EVENTS_FILE).write_text("".join(json.dumps(event) + "\n" for event in events))
    page = page_of(plan)
    [bar] = page.all("div", class_="bar")
    says = "productive 60.0 s, start-up 20.0 s, repeated steps 10.0 s, skipped steps 10.0 s"
    assert bar["aria-label"] == says
    text = " ".join(" ".join(part for parts in page.texts.values() for part in parts).split())
    assert "60.0 %" in text and "Skipped steps, whose gradients were left out: 3." in text
    assert "Rolled back from step 4 to after step 3; samples 6 to 8 are left out." in text
    assert "Left a damaged checkpoint behind: file <x> is missing." in text
    assert "Went on after step 3 from copies in memory; the newest checkpoint was of" in text
    assert "ended:" not in text and "1970-01-01 00:18:20 UTC" in text
    assert {"1,234", "400", "41.2 %", "25.0 %", "3.00"} <= set(page.texts["dd"])
    # All steps of the stage are behind it, though one of them taught nothing.
    assert page.texts["span"].count("done") == 1
    assert "4 of 15 steps" in text


def test_what_each_rank_does(plan):
    write_metrics(plan, steps=5)
    folder = plan.first.run_folder
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    lines = [{"step_seconds": 2.0, **line} for line in lines]
    lines[2]["communication_wait_seconds"] = 0.25
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    rank = {"host": "<node>", "stage": 0, "work_seconds": 1.0, "data_seconds": 0.1}
    rank |= {"communication_wait_seconds": 0.9, "gpu_celsius": 61, "gpu_megahertz": None}
    slow = rank | {"work_seconds": 1.75, "communication_wait_seconds": 0.15}
    found = {"step": 3, "measured_steps": 3, "stragglers": [9], "ranks": [rank] * 9 + [slow]}
    (folder / RANKS_FILE).write_text(json.dumps(found))
    page = page_of(plan)
    assert len(page.all("svg")) == 3
    assert "12.5 %" in page.texts["dd"]
    assert page.texts["th"].count("9") == 1 and "holds up others" in page.texts["b"]
    # The busiest of ten, and of them the slow one first.
    assert page.texts["td"][:5] == ["<node>", "1.750", "0.100", "0.150", "61"]
    assert page.texts["td"].count("<node>") == 8


def test_losses_by_source_are_drawn_beside_those_of_objectives(plan):
    write_metrics(plan, steps=7)
    folder = plan.first.run_folder
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    learned = [line for line in lines if line["stage"] == "captioning" and "loss" in line]
    learned[0] |= {"loss_source_web": 3.5, "loss_source_books": 2.5}
    learned[1] |= {"loss_source_web": 3.0, "loss_modality_text": 3.25}
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(plan)
    assert len(page.all("svg")) == 4
    assert {"loss by source", "web", "books", "loss by modality"} <= set(page.texts["text"])


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_after_its_first_steps(plan, steps):
    write_metrics(plan, steps)
    page = page_of(plan)
    assert page.texts["span"][0] == "under way" and len(page.all("svg")) == 2


def test_the_page_tells_no_credentials(plan):
    for stage in plan.stages:
        object.__setattr__(stage.run.checkpoint, "folder", "s3://KEY:s3cret@bucket")
    page_of(plan)
    page = (plan.first.run_folder / "report.html").read_text()
    assert "s3://***@bucket" in page and "s3cret" not in page
