"""What stopped a newcomer with a model of his own, from a cell to a package to a sweep: each now goes on, or says how."""
import pytest

from dwiml_nb.cli.common import run_command
from dwiml_nb.cli.runs import dwiml_config, dwiml_train
from dwiml_nb.cli.training import dwiml_visualize_logs
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.registry import class_named
from dwiml_nb.models.base import MainModelAbstract
from dwiml_nb.models.registered import registered_class
from dwiml_nb.study.toy import toy_study

RUN = """seed = 3
data = {hdf5_file = "study.hdf5", input_group_name = "input", streamline_group_name = "bundles"}
model = {name = "Learn2TrackModel", rnn_layer_sizes = [4], step_size = 2.0}
training = {experiment_name = "one", max_epochs = 1, max_batches_per_epoch_training = 1, max_batches_per_epoch_validation = 1, device = "cpu"}
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("newcomer")
    toy_study(folder)
    (folder / "run.toml").write_text(RUN)
    run_command(dwiml_train, [str(folder / "run.toml")])
    return folder


def said(capsys, command, *words):
    "What a command prints, or the sentence it ends with."
    capsys.readouterr()
    try: run_command(command, [str(w) for w in words])
    except SystemExit as e:
        if isinstance(e.code, str): return e.code
    told = capsys.readouterr()
    return told.out + told.err


# Words and options

def test_options_may_stand_before_values(here, tmp_path, capsys):
    name, mine = "training.experiment_name=between", tmp_path / "mine.py"
    mine.write_text("")
    assert "ended" in said(capsys, dwiml_train, here / "run.toml", "--trust", mine, name, "training.max_epochs=1")
    assert "max_epochs = 7" in said(capsys, dwiml_config, "new", "--out", tmp_path / "new.toml", "training.max_epochs=7") + (tmp_path / "new.toml").read_text()
    assert "unrecognized arguments: --lr" in said(capsys, dwiml_train, here / "run.toml", "--lr", "training.max_epochs=1")
    assert "experiments/one" in said(capsys, dwiml_visualize_logs, here / "experiments/one", "--save_figures", tmp_path / "f", here / "experiments/between") or (tmp_path / "f_1.png").exists()


# What is said

def test_a_shell_is_told_the_command_that_goes_on(here, capsys):
    assert f"dwiml_resume_training_from_checkpoint {here / 'experiments'} one;" in said(capsys, dwiml_train, here / "run.toml")


def test_a_file_is_checked_after_its_run(here, capsys):
    told = said(capsys, dwiml_config, "check", here / "run.toml")
    assert "makes a run" in told and f"the experiment {here / 'experiments/one'} exists already" in told
    assert "exists" not in said(capsys, dwiml_config, "check", here / "run.toml", "training.experiment_name=no")
    assert "name of an experiment" in said(capsys, dwiml_config, "check", here / "run.toml", "training.experiment_name=.no")


@pytest.mark.parametrize("look", [lambda: class_named("Nobody", MainModelAbstract), lambda: class_named("__main__.Nobody", MainModelAbstract, "run the cell."),
                                  lambda: class_named("nobody.Nobody", MainModelAbstract), lambda: registered_class("__main__.Nobody"), lambda: registered_class("nobody.Nobody")])
def test_what_to_do_about_a_class_is_whole_sentences(look):
    with pytest.raises(DataProblem) as e: look()
    assert not e.value.do.startswith("Or") and "--trust" in e.value.do and "trust=" in e.value.do and e.value.do.endswith(".") and "  " not in e.value.do
