"""The report of a run: whatever became of it, one page says so; nothing of a file is run, asked for or replaced."""
import json
import os
import re
import shutil
import time
from html.parser import HTMLParser

import numpy as np
import pytest

import dwiml_nb.widgets.report as page_of_report
from dwiml_nb.cli.common import run_command
from dwiml_nb.cli.losses import dwiml_visualize_loss
from dwiml_nb.cli.report import dwiml_report
from dwiml_nb.cli.tracking import dwiml_score
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.training.control import only_one
from dwiml_nb.widgets.report import SECTIONS, report_run, said_options
from dwiml_nb.widgets.viz import viz

RUN = """
[data]
hdf5_file = "study.hdf5"
input_group_name = "input"
streamline_group_name = "bundles"
[model]
rnn_layer_sizes = [8]
step_size = 2.0
dropout = 0.1
[training]
experiments_path = "experiments"
experiment_name = "told"
max_epochs = 2
max_batches_per_epoch_training = 2
on_nan = "skip"
[tracking]
tracking_mask_group = "wm_mask"
min_length_mm = 0.0
max_length_mm = 40.0
[[logging.sinks]]
key = "epoch_tracks"
nb_seeds = 12
"""


class Tags(HTMLParser):
    "What a page would ask for, its scripts that are run, and its words."
    def __init__(self, text):
        super().__init__()
        self.asked, self.words, self.scripts, self.handlers, self.inside = [], [], 0, [], None
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.scripts += tag == "script"
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        self.asked += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data") and not v.startswith(("data:", "#"))]
    def handle_endtag(self, tag): self.inside = None
    def handle_data(self, text):
        if self.inside not in ("script", "style"): self.words.append(text)


@pytest.fixture
def run(here, tmp_path):
    "A copy of the run, to be spoilt."
    return shutil.copytree(here / "experiments" / "told", tmp_path / "told")


def told(run, **how):
    text = report_run(run, run.parent / f"page{time.monotonic_ns()}.html", **how).read_text()
    return text, " ".join(" ".join(Tags(text).words).split())


def change(run, file, **what):
    record = json.loads((run / file).read_text())
    (run / file).write_text(json.dumps({**record, **what}))


def test_all_of_a_run_is_on_one_page_that_asks_for_nothing(here, run):
    lines = sorted((here / "subjects" / "sub-04" / "bundles").glob("*.trk"))
    text, words = told(run, tractograms=lines[:1], reference=here / "subjects" / "sub-04")
    tags = Tags(text)
    assert tags.asked == [] and tags.handlers == [] and "This cannot be told" not in words and len(text) < 2e6
    assert re.findall("<h2>(.*?)</h2>", text) == list(SECTIONS)
    assert text.count('class="dwiml-turns"') == 3 and text.count("class StageView") == 1                       # epochs; the tractogram, the truth
    assert text.count('class="dwiml-on-paper"') == 3
    assert "240 lines of 2 subjects for training; 120 lines of 1 subject for validation" in words
    assert text.count("data-epoch=") == 2 and "epoch 2: " in words and lines[0].name in words and "truth" in words
    assert "1.000" in words                                                                                     # the share of valid lines of the truth
    assert "1 began" not in words and "ended in order" in words and "Nothing failed." in words


def test_what_differs_from_the_defaults_comes_first(run):
    text, _ = told(run)
    chosen, usual = text.replace("<wbr>", "").split("as the defaults are</summary>")
    for name in ("rnn_layer_sizes", "dropout", "on_nan", "max_epochs"): assert f"<td>{name}</td>" in chosen
    assert "<td>clip_grad</td>" in usual and "<td>clip_grad</td>" not in chosen
    record = json.loads((run / "parameters_latest.json").read_text())
    by_name = {(o.part, o.name): o for o in said_options(record)}
    assert by_name["trainer", "learning_rates"].differs is False and by_name["trainer", "learning_rates"].default == "[0.001]"   # a tuple there, a list in the file
    assert by_name["model", "nb_features"].default == "must be given" and by_name["model", "dropout"].default == "0.0"


def test_a_dashboard_is_kept_as_the_same_page(run, monkeypatch):
    monkeypatch.setattr(page_of_report, "moment", lambda: "now")
    board = viz(run)
    kept = board.to_html().read_text()
    board.close()
    same = lambda text: re.sub(r"\b[pm][0-9a-f]{10}\b", "", text)                                                 # matplotlib draws names for its parts
    assert same(kept) == same(report_run(run, run.parent / "same.html").read_text())
    with pytest.raises(FileExistsError, match="overwrite=True"): viz(run).to_html()


def test_nothing_is_replaced_unasked(run, tmp_path):
    made = report_run(run)
    before = made.read_bytes()
    with pytest.raises((DataProblem, FileExistsError), match="already"): report_run(run)
    assert made.read_bytes() == before
    assert report_run(run, overwrite=True) == run / "report.html"
    scores = tmp_path / "scores.html"
    scores.write_text(json.dumps(dict.fromkeys(("VS", "IB", "NC", "OL", "OR", "F1"), 0.5)))
    with pytest.raises(DataProblem): report_run(run, scores, scores=[scores], overwrite=True)                    # it is read
    assert "VS" in scores.read_text()


def test_text_of_files_is_text(run):
    evil = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
    record = json.loads((run / "parameters_latest.json").read_text())
    record["dataset"]["hdf5_file"] = f"/nowhere/{evil}"
    record["model"]["params"][evil] = evil
    record["model"]["class"] = f"evil.{evil}"
    record["study"]["training"] = {evil: 3}
    record["versions"][evil] = evil
    record["trust"] = [evil]
    (run / "parameters_latest.json").write_text(json.dumps(record))
    for file in run.glob("parameters_2*.json"): file.write_text(json.dumps(record))
    (run / "sessions.jsonl").write_text(json.dumps({"began": evil, "process": 1, "host": evil, "command": evil}) + "\n" + json.dumps({"ended": "x", "why": evil}) + "\n")
    with open(run / "logs" / "tracks.jsonl", "a") as f: f.write(json.dumps({"epoch": 0, "problem": evil}) + "\n")
    with open(run / "logs" / "batches.jsonl", "a") as f: f.write(json.dumps({"phase": evil, "epoch": 1, "batch": 0, "loss": 1.0}) + "\n")
    (run / f"{'x'*3}.json").write_text(json.dumps({evil: {**dict.fromkeys(("VS", "IB", "NC", "OL", "OR", "F1"), 0.5), "bundles": {evil: {"OL": 1.0}}}}))
    moved = run.rename(run.parent / "<b onclick=alert(3)>")
    text, words = told(moved)
    assert "alert(2)" in words and evil not in text and "<b onclick" not in text
    tags = Tags(text)
    assert tags.handlers == [] and tags.asked == [] and tags.scripts == Tags(told_again(moved)).scripts


def told_again(run):
    "The page of a run that holds no such text: as many scripts."
    return report_run(run, run.parent / "again.html").read_text()


def test_no_class_that_a_record_names_is_imported(run, tmp_path, monkeypatch):
    (tmp_path / "imported_by_a_report.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    record = json.loads((run / "parameters_latest.json").read_text())
    record["model"]["class"] = "imported_by_a_report.Model"
    (run / "parameters_latest.json").write_text(json.dumps(record))
    assert "Defaults not known, as the class is not loaded: imported_by_a_report.Model." in told(run)[1]


def began(process, host=os.uname().nodename): return json.dumps({"began": "2026-01-01T00:00:00", "process": process, "host": host}) + "\n"


@pytest.fixture
def half(run):
    "As it was after three batches."
    for name, keep in (("epochs", 0), ("batches", 3), ("tracks", 0)):
        file = run / "logs" / f"{name}.jsonl"
        file.write_text("".join(file.read_text().splitlines(True)[:keep]))
    shutil.rmtree(run / "best_model")
    shutil.rmtree(run / "tracks")
    return run


def test_a_run_that_died_says_so(half):
    (half / "sessions.jsonl").write_text(began(2**22 + 1) + began(2**22 + 2))
    text, words = told(half)
    assert "died: epoch 1 of 2" in words and words.count("left no word: killed, or out of memory") >= 2
    assert "there is no best_model yet" in words and "session 1 of 2, begun 2026-01-01T00:00:00: left no word" in words
    assert "Tractograms of the epochs" not in words and text.count("dwiml-turns") < 5


def test_a_run_that_failed_says_why(half):
    (half / "sessions.jsonl").write_text(began(1) + json.dumps({"ended": "2026-01-01T01:00:00", "process": 1, "why": "NotFinite: the loss is nan"}) + "\n")
    assert "the state of the run: failed" in told(half)[1] and "NotFinite: the loss is nan" in told(half)[1]


def test_a_run_that_goes_on_says_so(half):
    (half / "sessions.jsonl").write_text(began(os.getpid()))
    with only_one(half): words = told(half)[1]
    assert "running: epoch 1 of 2" in words and "This run goes on" in words and "goes on" in words.split("Sessions")[1]


def test_skipped_batches_and_losses_that_are_no_numbers_are_told(half):
    with open(half / "logs" / "batches.jsonl", "a") as f:
        f.write(json.dumps({"phase": "training", "epoch": 1, "batch": 0, "loss": "nan", "skipped": 1, "seconds": 0.1}) + "\n")
        f.write(json.dumps({"phase": "training", "epoch": 1, "batch": 1, "loss": "inf", "skipped": 0, "seconds": 0.1}) + "\n")
    words = told(half)[1]
    assert "training batches were skipped, as their loss or gradient was not finite: epoch 2 batch 1" in words
    assert "training losses are not finite: epoch 2 batch 2" in words


def test_an_epoch_that_was_not_tracked_is_told(run):
    with open(run / "logs" / "tracks.jsonl", "a") as f: f.write(json.dumps({"epoch": 1, "problem": "the mask is empty."}) + "\n")
    text, words = told(run)
    assert "epoch 2 was not tracked: the mask is empty." in words and text.count("data-epoch=") == 1


def test_an_older_run_and_one_of_dwi_ml_have_a_report(run, tmp_path):
    (run / "sessions.jsonl").unlink()
    for file in run.glob("parameters_*.json"):
        record = json.loads(file.read_text())
        for key in ("fingerprint", "num_threads", "study", "versions"): record.pop(key)
        file.write_text(json.dumps(record))
    words = told(run)[1]
    assert "A run of before sessions were kept." in words and "16×16×5, 2 mm RAS" in words and "cannot be told" not in words
    theirs = tmp_path / "theirs"
    (theirs / "logs").mkdir(parents=True)
    np.save(theirs / "logs" / "train_loss_monitor_per_epoch.npy", [3.0, 2.0])
    (theirs / "parameters_latest.json").write_text(json.dumps({"hdf5 file": str(tmp_path / "gone.hdf5"), "Loader params": {"input_group_name": "input", "streamline_group_name": "bundles"}}))
    words = told(theirs)[1]
    assert "is not loaded: the loader, not recorded." in words and "The study cannot be looked at now" in words and "the last 2 epochs in numbers" in words and "cannot be told" not in words


def test_a_torn_or_damaged_file_spoils_its_part_alone(run):
    with open(run / "logs" / "tracks.jsonl", "a") as f: f.write('{"epoch": 1, "nb_li')                                    # torn: not there yet
    assert "cannot be told" not in told(run)[1]
    next((run / "tracks").glob("*.trx")).write_bytes(b"PK no such file")
    words = told(run)[1]
    assert words.count("This cannot be told") == 1 and "Environment dwiml_nb" not in words.split("Environment")[0] and "threads" in words


def test_scores_of_every_kind_of_file_stand_beside_each_other(here, run, tmp_path):
    a, b = sorted((here / "subjects" / "sub-04" / "bundles").glob("*.trk"))
    for out, files in (("one.json", [a]), ("two.json", [a, b])): run_command(dwiml_score, [*map(str, files), str(here / "subjects" / "sub-04"), "--out", str(tmp_path / out)])
    numbers = dict.fromkeys(("VS", "IB", "NC", "OL", "OR", "F1"), 0.125)
    (tmp_path / "demo.json").write_text(json.dumps({"ours": numbers, "csd": numbers, "seed": 1}))
    words = told(run, scores=[tmp_path / o for o in ("one.json", "two.json", "demo.json")])[1]
    scores = words.split("Scores")[-1]
    for name in ("one.json", a.name, b.name, "ours", "csd"): assert name in scores, name
    assert scores.count("0.125") == 12
    view = viz(tmp_path / "two.json")
    assert list(view.scores) == [a.name, b.name]
    view.close()


def test_the_worst_lines_that_were_kept_are_shown(run):
    run_command(dwiml_visualize_loss, [str(run), "sub-03", "--device", "cpu", "--save_colored_best_and_worst", "5"])
    text, words = told(run)
    assert "sub-03_worst5percent: 6 of 6 lines" in words and text.count('class="dwiml-turns"') == 2
    assert "keeps the worst lines; then" not in words


@pytest.mark.parametrize("words, said", [
    (["nowhere"], "there is no such experiment"),
    (["."], "not the folder of an experiment"),
    (["told", "--out", "page.txt"], "ends in .html"),
    (["told", "--out", "no/page.html"], "no such folder"),
    (["told", "--scores", "told/run.toml"], "run.toml"),
    (["told", "--scores", "empty.json"], "no scores are in this file"),
    (["told", "--tractograms", "gone.trk"], "there is no such tractogram"),
], ids=range(7))
def test_bad_input_is_one_sentence(run, monkeypatch, words, said, capsys):
    monkeypatch.chdir(run.parent)
    (run.parent / "empty.json").write_text("{}")
    with pytest.raises(SystemExit) as e: run_command(dwiml_report, words)
    assert said in str(e.value) and "Traceback" not in str(e.value)
    assert not list(run.rglob("*.html"))
