"""Config files and the arguments behind their colon."""

import importlib.util
import pathlib

import ml_collections
import pytest

import mergejax as mj
from mergejax import config_args, fit
from mergejax.models import bodies

CONFIGS = sorted(pathlib.Path(__file__).parent.parent.glob("configs/*.py"))


def _module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_locked_has_a_lab_note_and_fits_what_reads_it(path):
    module = _module(path)
    assert f"--config=configs/{path.name}" in module.__doc__
    config = module.get_config()
    with pytest.raises(AttributeError):
        config.sede = 1
    with pytest.raises(AttributeError):
        config.training.pretrain.stpes = 1
    bodies.build(config.model)
    for settings in config.training.values():
        fit.Settings(**settings)
    assert config.methods == ()
    assert isinstance(config.seed, int)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_runlocal_is_shorter_and_methods_are_passed_on(path):
    get_config = _module(path).get_config
    config, local = get_config(), get_config("methods=ties+lines,runlocal")
    assert local.methods == ("ties", "lines")
    assert all(local.training[kind].steps < config.training[kind].steps for kind in config.training)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_methods_can_be_overridden_with_any_tuple(path):
    config = _module(path).get_config()
    config.methods = ("drop(rate=0.9)|ties(density=0.2)",)
    config.methods = ()


DEFAULTS = {"methods": (), "runlocal": False, "steps": 10, "rate": 0.5, "name": "digits"}


@pytest.mark.parametrize(
    ("argument", "changed"),
    [
        (None, {}),
        ("", {}),
        ("runlocal", {"runlocal": True}),
        ("runlocal=false", {"runlocal": False}),
        ("methods=ties+lines", {"methods": ("ties", "lines")}),
        ("methods=ties", {"methods": ("ties",)}),
        (
            "methods=drop(rate=0.9)|ties(density=0.2,scaling=1)+slerp,runlocal",
            {"methods": ("drop(rate=0.9)|ties(density=0.2,scaling=1)", "slerp"), "runlocal": True},
        ),
        ("steps=3,rate=1,name=a=b", {"steps": 3, "rate": 1.0, "name": "a=b"}),
        ("methods=f(x='a,b+c')", {"methods": ("f(x='a,b+c')",)}),
    ],
)
def test_parse(argument, changed):
    found = config_args.parse(argument, **DEFAULTS)
    assert found == ml_collections.ConfigDict({**DEFAULTS, **changed})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("runlocl", "no argument 'runlocl', did you mean 'runlocal'"),
        ("method=ties", "did you mean 'methods'"),
        ("methods", "it needs a value, as in methods=..."),
        ("steps=many", "expected a value of type int, such as 10"),
        ("runlocal=perhaps", "expected a value of type bool"),
    ],
)
def test_parse_refuses(argument, message):
    with pytest.raises(mj.MergeError) as raised:
        config_args.parse(argument, **DEFAULTS)
    assert message in str(raised.value)


def test_parse_reports_every_problem():
    with pytest.raises(mj.MergeError) as raised:
        config_args.parse("runlocl,stps=3", **DEFAULTS)
    assert len(str(raised.value).splitlines()) == 2
