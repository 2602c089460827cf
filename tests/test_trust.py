"""No name in a file becomes an import or a call on its own: what is resolved, what is refused, and that nothing of it ran."""
import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.cli.tracking import dwiml_track_from_model
from dwiml_nb.cli.training import dwiml_resume_training_from_checkpoint
from dwiml_nb.core import registry
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.registry import Registry, class_named, trusting
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.base import MODEL_CLASSES, MainModelAbstract, load_model
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.runs.track import track_from_model
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.trainer import DWIMLTrainerOneInput
from dwiml_nb.widgets.training_dashboard import TrainingDashboard

SOURCE = """
from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

with open({mark!r}, 'a') as mark: mark.write(__name__ + ' ')        # whoever runs this leaves a trace

class Net{n}(Learn2TrackModel): pass
class Sampler{n}(DWIMLBatchIDSampler): pass
class Loader{n}(DWIMLBatchLoaderOneInput):
    def load_batch_streamlines(self, ids):
        with open({mark!r}, 'a') as mark: mark.write(f'batch:{{__import__("os").getpid()}} ')
        return super().load_batch_streamlines(ids)
class Data{n}(MultiSubjectDataset): pass
class Trainer{n}(DWIMLTrainerOneInput): pass
def function(*args, **kwargs): open({mark!r}, 'a').write('called ')
class NoNet: pass
"""
OURS = {"model": Learn2TrackModel, "sampler": DWIMLBatchIDSampler, "loader": DWIMLBatchLoaderOneInput, "dataset": MultiSubjectDataset,
        "trainer": DWIMLTrainerOneInput}
WORDS = {"model": "Net", "sampler": "Sampler", "loader": "Loader", "dataset": "Data", "trainer": "Trainer"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "An experiment of one epoch, with the library's own classes."
    folder = tmp_path_factory.mktemp("made")
    dataset = MultiSubjectDataset(toy_study(folder))
    dataset.load_data()
    torch.manual_seed(0)
    model = Learn2TrackModel(dataset.nb_features["input"], rnn_key="gru", rnn_layer_sizes=[4], nb_previous_dirs=1, step_size=2.0)
    trainer = DWIMLTrainerOneInput(model, folder/"experiments", "ours", DWIMLBatchIDSampler(dataset, "bundles", 30),
                                   DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles"), device="cpu", max_epochs=1,
                                   max_batches_per_epoch_training=2, max_batches_per_epoch_validation=1)
    trainer.train_and_validate()
    dataset.close()
    return folder


@pytest.fixture(autouse=True)
def forgotten(monkeypatch, tmp_path):
    "Each test begins with nothing trusted, and in a folder of its own."
    monkeypatch.delenv("DWIML_TRUST", raising=False)
    (tmp_path/"here").mkdir()
    monkeypatch.chdir(tmp_path/"here")
    before, known = set(sys.modules), set(MODEL_CLASSES.entries)
    yield
    for name in set(sys.modules) - before:
        if not name.startswith(("dwiml_nb", "torch")): del sys.modules[name]
    for name in set(MODEL_CLASSES.entries) - known: del MODEL_CLASSES.entries[name]
    registry.brought_in.clear()
    registry.loaded_plugins.clear()
    registry.plugins.cache_clear()


class Case:
    "An experiment in `tmp_path` whose record names other classes, and a mark that their module leaves when it runs."
    count = 0

    def __init__(self, made, tmp_path):
        Case.count += 1
        self.n, self.tmp, self.mark = Case.count, tmp_path, tmp_path/"mark"
        self.name = f"mine_{self.n}"
        self.folder = tmp_path/"experiments"
        shutil.copytree(made/"experiments", self.folder)
        (self.folder/"ours").rename(self.folder/"first")

    def write(self, path):
        "The module's source in a file."
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCE.format(mark=str(self.mark), n=self.n))
        return path

    def record(self, module=None, **paths):
        "Let the record name classes of a module, or just some paths."
        paths = {**({part: f"{module}.{word}{self.n}" for part, word in WORDS.items()} if module else {}), **paths}
        for file in (*self.folder.rglob("params.json"), *self.folder.rglob("parameters_latest.json")):
            kept = json.loads(file.read_text())
            for part, path in paths.items(): kept[part]["class"] = path
            file.write_text(json.dumps(kept))
        if "model" not in paths: return self
        for file in self.folder.rglob("model_class.json"):
            file.write_text(json.dumps({**json.loads(file.read_text()), "class": paths["model"]}))
            file.with_name("model_type.txt").write_text(str(paths["model"]).rpartition(".")[2])
        return self

    def resume(self, **kwargs): dwiml_resume_training_from_checkpoint(str(self.folder), "first", new_max_epochs=2, device="cpu", **kwargs)
    def track(self, **kwargs):
        dwiml_track_from_model(str(self.folder/"first"), "sub-04", str(self.tmp/"lines.trx"), "seed_mask", nt=20, device="cpu", overwrite=True, **kwargs)
    def dashboard(self, **kwargs):
        board = TrainingDashboard(trainer_from_folder(self.folder, "first", new_max_epochs=2, device="cpu", **kwargs))
        board.start()
        assert board.wait(60) == "ended", board.error
    @property
    def ran(self): return self.mark.read_text().split() if self.mark.exists() else []


@pytest.fixture
def case(made, tmp_path): return Case(made, tmp_path)


def told(capsys, f, *args, **kwargs):
    "The one sentence with which a command ends."
    with pytest.raises(SystemExit) as ended: f(*args, **kwargs)
    assert isinstance(ended.value.code, str) and ended.value.code.startswith("Error: ") and "\n" not in ended.value.code
    assert "Traceback" not in capsys.readouterr().err
    return ended.value.code


# ---- what is allowed

def installed(case, monkeypatch, plugin=True):
    "A package in a folder of PYTHONPATH, as pip leaves it."
    site = case.tmp/"site"
    case.write(site/case.name/"models.py")
    (site/case.name/"__init__.py").write_text("")
    info = site/f"{case.name}-1.0.dist-info"
    info.mkdir()
    (info/"METADATA").write_text(f"Metadata-Version: 2.1\nName: {case.name}\nVersion: 1.0\n")
    if plugin: (info/"entry_points.txt").write_text(f"[dwiml_nb.plugins]\nmodels = {case.name}.models\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(site)
    return site


@pytest.mark.parametrize("do", ["resume", "track", "dashboard"])
@pytest.mark.parametrize("where", ["cell", "script", "file", "environment", "package", "submodule", "plugin"])
def test_own_classes(case, where, do, monkeypatch):
    "A cell, a script, a file, a package: allowed in its way, each is found."
    trust = ()
    if where == "cell":
        case.session = {"__name__": "__main__"}
        exec(SOURCE.format(mark=str(case.mark), n=case.n), case.session)
        case.record("__main__")
    elif where in ("script", "file", "environment"):
        trust = case.write(case.tmp/f"{case.name}.py")
        case.record("__main__" if where == "script" else case.name)
        if where == "environment":
            monkeypatch.setenv("DWIML_TRUST", f"json,{trust}")
            trust = ()
    else:
        installed(case, monkeypatch, where == "plugin")
        case.record(f"{case.name}.models")
        trust = {"package": case.name, "submodule": f"{case.name}.models", "plugin": ()}[where]
    getattr(case, do)(trust=trust)
    assert case.ran[0] in ("__main__", case.name, f"{case.name}.models")
    if do == "track": assert (case.tmp/"lines.trx").exists()
    else: assert any("batch:" in o for o in case.ran)
    if do == "resume" and where != "cell":
        used = json.loads((case.folder/"first"/"parameters_latest.json").read_text())["trust"]
        assert any(case.name in word for word in used)


def test_openers_take_trust(case):
    "Each in Python; what is trusted inside is trusted no longer outside, but stays imported."
    file = case.write(case.tmp/f"{case.name}.py")
    case.record(case.name)
    folder = case.folder/"first"
    with pytest.raises(DataProblem, match="not on this machine, nor allowed"): load_model(folder/"best_model")
    assert case.ran == []
    assert type(load_model(folder/"best_model", trust=file)).__name__ == f"Net{case.n}"
    assert registry.trusted.get() == frozenset() and case.ran == [case.name]
    track_from_model(folder, "sub-04", case.tmp/"lines.trx", "seed_mask", nt=5, device="cpu", trust=[file])
    assert type(trainer_from_folder(case.folder, "first", new_max_epochs=2, device="cpu", trust=file)).__name__ == f"Trainer{case.n}"


def test_spawned_workers(case):
    """A process that is started anew unpickles a loader of a file that only the other process was told to trust, and a dataset of a
    plugin; the environment counts in both. No plugin is looked for while the library is imported."""
    run = case.tmp/"here"/"run.py"                                          # Python would import from its folder
    run.write_text(textwrap.dedent("""
        import multiprocessing
        if __name__ == '__main__':
            import dwiml_nb.all
            from dwiml_nb.cli.training import dwiml_resume_training_from_checkpoint
            from dwiml_nb.core.registry import loaded_plugins, plugins
            assert plugins.cache_info().misses == 0 and not loaded_plugins
            multiprocessing.set_start_method('spawn')
            dwiml_resume_training_from_checkpoint()
        """))
    with pytest.MonkeyPatch.context() as patch: site = installed(case, patch)
    one, two = (case.write(case.tmp/f"{o}_{case.n}.py") for o in ("one", "two"))
    case.record(one.stem, dataset=f"{case.name}.models.Data{case.n}", sampler=f"{two.stem}.Sampler{case.n}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(site)]), "DWIML_TRUST": str(two)}
    done = subprocess.run([sys.executable, run, case.folder, "first", "--new_max_epochs", "2", "--device", "cpu", "--nb_cpu_processes", "1",
                           "--trust", one], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len({o for o in case.ran if "batch:" in o}) == 2                                  # a worker for training, one for validation
    assert all(case.ran.count(o) >= 2 for o in (one.stem, f"{case.name}.models")), case.ran  # here and there


# ---- what is not

@pytest.mark.parametrize("do", ["resume", "track"])
@pytest.mark.parametrize("where", ["script", "file", "package", "here"])
def test_strangers_classes(case, where, do, monkeypatch, capsys):
    "Not allowed: one sentence that names the class and the way out; the module did not run."
    path = case.write(case.tmp/f"{case.name}.py")
    module = {"script": "__main__", "package": f"{case.name}.models"}.get(where, case.name)
    if where == "file": monkeypatch.syspath_prepend(case.tmp)                            # it could be imported
    if where == "package": installed(case, monkeypatch, plugin=False)
    if where == "here":                                                                   # the working directory is not special
        monkeypatch.syspath_prepend("")
        path.rename(case.tmp/"here"/path.name)
    sentence = told(capsys, getattr(case.record(module), do))
    assert case.ran == [] and case.name not in sys.modules
    if where == "script": assert "probably defined in a notebook or a script" in sentence and "--trust script.py" in sentence
    else: assert f"is a class of '{case.name}', which was not allowed to run here" in sentence and f"--trust {case.name}" in sentence
    if do == "resume": assert "init_from_checkpoint(model, …)" in sentence


def test_a_folder_cannot_announce_itself(case, monkeypatch, capsys):
    "What lies in the working directory is not installed, even if it says so and Python would import from there."
    site = installed(case, monkeypatch)
    monkeypatch.syspath_prepend("")
    monkeypatch.chdir(site)
    assert "was not allowed" in told(capsys, case.record(f"{case.name}.models").resume)
    assert case.ran == []


HOSTILE = {
    "a callable as the dataset's class": ("dataset", "IPython.start_ipython", "'IPython', which was not allowed"),
    "a function of ours": ("dataset", "dwiml_nb.study.toy.toy_study", "cannot be imported here"),
    "a function of a package of Python": ("sampler", "os.system", "'os', which was not allowed"),
    "through a module of ours": ("loader", "dwiml_nb.core.files.os.system", "cannot be imported here"),
    "through a class of ours": ("loader", "dwiml_nb.core.files.Path.cwd", "cannot be imported here"),
    "another class of ours": ("sampler", "dwiml_nb.data.dataset.MultiSubjectDataset", "is not what belongs here"),
    "the abstract parent of all": ("trainer", "builtins.object", "'builtins', which was not allowed"),
    "a torch class": ("model", "torch.nn.modules.linear.Linear", "'torch', which was not allowed"),
    "a torch function": ("model", "torch.hub.load", "'torch', which was not allowed"),
    "a module that ends the program": ("model", "this.is.Model", "'this', which was not allowed"),
    "a main program of ours": ("model", "dwiml_nb.__main__.Net", "is no path of a class"),
    "a local class": ("model", "somewhere.function.<locals>.Net", "probably defined in a notebook or a script"),
    "no path": ("trainer", "exec('1')", "cannot be imported here"),
    "no text": ("loader", ["dwiml_nb"], "is named by no text"),
    "nothing": ("loader", "", "cannot be imported here"),
    "dots": ("loader", "..", "cannot be imported here"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_records(case, name, capsys):
    part, path, words = HOSTILE[name]
    before = set(sys.modules)
    case.record(**{part: path})
    sentence = told(capsys, case.resume)
    assert words in sentence, sentence
    assert {o for o in set(sys.modules) - before if not o.startswith(("dwiml_nb", "torch", "numba"))} & {"this", "antigravity", "IPython"} == set()
    if part == "model" and isinstance(path, str): assert "Error: " in told(capsys, case.track)


CHANGES = {
    "new trainer option": (lambda p, s: p["trainer"]["params"].update(new=1), "options that are not known here"),
    "new sampler option": (lambda p, s: p["sampler"]["params"].update(new=1), "Found: new."),
    "an option that no record gives": (lambda p, s: p["loader"]["params"].update(model=1), "Found: model."),
    "no study": (lambda p, s: p.pop("study"), "no study"),
    "an empty record": (lambda p, s: p.clear(), "no trainer, no model"),
    "a part that is a list": (lambda p, s: p.update(loader=[]), "a list in loader"),
    "a path that is a number": (lambda p, s: p["dataset"].update(hdf5_file=5), "hdf5_file is a int in dataset"),
    "no optimiser": (lambda p, s: s.pop("optimizer"), "no optimizer"),
    "no random state": (lambda p, s: s.pop("torch_rng"), "no torch_rng"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_records_of_another_version(case, name, capsys):
    "What is missing, new or of another kind is named, with the version that wrote it."
    change, words = CHANGES[name]
    files = [case.folder/"first"/"checkpoint"/o for o in ("params.json", "state.pt")]
    latest = case.folder/"first"/"parameters_latest.json"
    record = json.loads(latest.read_text())
    latest.write_text(json.dumps(record | {"versions": record["versions"] | {"dwiml_nb": "0.0.7"}}))
    params, state = json.loads(files[0].read_text()), torch.load(files[1], weights_only=True)
    change(params, state)
    files[0].write_text(json.dumps(params))
    torch.save(state, files[1])
    sentence = told(capsys, case.resume)
    assert words in sentence and "use the version of dwiml_nb that wrote it (0.0.7; " in sentence, sentence
    latest.write_text(json.dumps(record))
    assert "it was changed after this version wrote it: restore a copy" in told(capsys, case.resume)


def test_records_of_earlier_versions(case, capsys):
    "An option that did not exist yet had its default; weights that are none are told."
    file, weights = case.folder/"first"/"checkpoint"/"params.json", case.folder/"first"/"checkpoint"/"model"/"model_state.pkl"
    params = json.loads(file.read_text())
    del params["trainer"]["params"]["lr_schedule"]
    file.write_text(json.dumps(params))
    trainer_from_folder(case.folder, "first", new_max_epochs=2, device="cpu")
    torch.save([1], weights)
    assert "the weights do not fit this model" in told(capsys, case.resume)


@pytest.mark.parametrize("part,path,words", [("model", "{}.NoNet", "is not what belongs here"), ("dataset", "{}.function", "cannot be imported here"),
                                             ("sampler", "{}.Net1", "cannot be imported here"), ("loader", "{}.Path.cwd", "cannot be imported here")])
def test_trust_is_no_blank_cheque(case, part, path, words, capsys):
    "Of a trusted module too: a class, of the right family; a function is never called."
    file = case.write(case.tmp/f"{case.name}.py")
    case.record(case.name, **{part: path.format(case.name)})
    assert words in told(capsys, case.resume, trust=[str(file)])
    assert "called" not in case.ran


def test_one_name_of_two(case, capsys, monkeypatch):
    "A bare name, or one from a script, must be the only one; a full path decides."
    monkeypatch.syspath_prepend(case.tmp)
    other = Case.__new__(Case)
    other.__dict__.update(case.__dict__, name=f"other_{case.n}")
    files = [c.write(case.tmp/f"{c.name}.py") for c in (case, other)]
    case.record("__main__")
    assert f"is called 'Trainer{case.n}'" in told(capsys, case.resume, trust=[str(f) for f in files])
    case.record(other.name)
    case.resume(trust=[str(f) for f in files])
    (case.folder/"first"/"best_model"/"model_class.json").unlink()                       # as dwi_ml leaves a model
    with pytest.raises(DataProblem, match="more than one MainModelAbstract here"): load_model(case.folder/"first"/"best_model")


def test_what_cannot_be_trusted(case, capsys, monkeypatch):
    "Each word that is wrong has its sentence, before anything is opened."
    broken, ends, hides = (case.tmp/f"{o}_{case.n}.py" for o in ("broken", "ends", "hides"))
    broken.write_text("import no_such_module_anywhere")
    ends.write_text("import sys; sys.exit(0)")
    hides = case.tmp/"token.py"
    hides.write_text("")
    for word, words in {str(broken): "No module named 'no_such_module_anywhere'", str(ends): "SystemExit: 0", str(hides): "would hide the module 'token'",
                        "no_such_package_1": "cannot be imported", str(case.tmp): "cannot be trusted", f"{case.tmp}/no.py": "no such file",
                        "": "cannot be trusted", "a b": "cannot be trusted"}.items():
        sentence = told(capsys, case.resume, trust=[word])
        assert words in sentence, sentence
    monkeypatch.setenv("DWIML_TRUST", "no_such_package_2")
    assert "no_such_package_2" in told(capsys, case.record("nobody").resume)


def test_a_broken_plugin_is_told_once(case, monkeypatch):
    "It does not stop whoever does not need it."
    site = installed(case, monkeypatch)
    (site/case.name/"models.py").write_text("import no_such_module_anywhere")
    things = Registry("thing")
    things.register("a", 1)
    with pytest.warns(UserWarning, match=f"the plugin {case.name} cannot be imported"): assert "b" not in things
    with pytest.raises(ValueError, match="unknown thing 'b'. It is one of a."): things["b"]
    assert things["a"] == 1


def test_registries_find_what_plugins_add(case, monkeypatch):
    "A name that is not known is looked for in installed plugins; nothing is imported before."
    import dwiml_nb.core
    things = Registry("thing")
    monkeypatch.setattr(dwiml_nb.core, "THINGS", things, raising=False)
    site = installed(case, monkeypatch)
    (site/case.name/"models.py").write_text(SOURCE.format(mark=str(case.mark), n=case.n) + "\nfrom dwiml_nb.core import THINGS\nTHINGS.register('extra', 3)")
    things.register("a", 1)
    assert things["a"] == 1 and case.ran == []
    assert things["extra"] == 3 and things.get("more") is None and list(things) == ["a", "extra"]


def test_a_cell_that_runs_again(case):
    "The later class counts, though the older one is still there, and though its parent has changed."
    cells = [f"class Net{case.n}({parent}): number = {i}" for i, parent in enumerate(("Learn2TrackModel", "MainModelAbstract"))]
    names = {"__name__": case.name, "Learn2TrackModel": Learn2TrackModel, "MainModelAbstract": MainModelAbstract}
    sys.modules[case.name] = type(sys)(case.name)
    kept = []
    for cell in cells:
        exec(cell, names)
        kept.append(names[f"Net{case.n}"])
        setattr(sys.modules[case.name], f"Net{case.n}", kept[-1])
    for path in (f"{case.name}.Net{case.n}", f"Net{case.n}"):
        assert class_named(path, MainModelAbstract) is kept[1] is MODEL_CLASSES[path]
    assert class_named(f"{case.name}.Net{case.n}", Learn2TrackModel) is kept[0]


def test_torch_classes_by_name():
    "For optimisers and schedules: a class of the module that is allowed here, and a child of its base."
    optimisers = dict(base=torch.optim.Optimizer, trust="torch.optim")
    assert class_named("torch.optim.adagrad.Adagrad", **optimisers) is class_named("torch.optim.Adagrad", **optimisers) is torch.optim.Adagrad
    for path in ("torch.optim.swa_utils.AveragedModel", "torch.optim.lr_scheduler.StepLR", "torch.hub.load", "torch.optim.sgd.sgd", "torch.nn.Linear"):
        with pytest.raises(DataProblem): class_named(path, **optimisers)
    with trusting(["torch.optim"]), pytest.raises(DataProblem, match="'torch', which was not allowed"): class_named("torch.nn.Linear", torch.optim.Optimizer)


def test_moved_classes_are_found(monkeypatch):
    monkeypatch.setitem(registry.MOVED, "dwiml_nb.of_old.Learn2TrackModel", "dwiml_nb.models.learn2track.Learn2TrackModel")
    assert class_named("dwiml_nb.of_old.Learn2TrackModel", MainModelAbstract) is Learn2TrackModel
