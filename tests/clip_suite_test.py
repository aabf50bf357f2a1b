"""CLIP as the model of a suite: heads of words, given experts, published numbers."""

import importlib.util
import io
import pathlib

import numpy as np
import pytest

import mergejax as mj
from mergejax import data, experiment, progress, suite, train, workdir
from mergejax.data import clip
from mergejax.data.task import Split, Task
from mergejax.eval import published, sections, seeds
from mergejax.models import bodies, zero_shot

torch = pytest.importorskip("torch", reason="PyTorch is the reference")
transformers = pytest.importorskip("transformers", reason="transformers is the reference")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.xdist_group("clip_suite")
ROOT = pathlib.Path(__file__).parent.parent
TASKS = ("eurosat", "mnist")
LABELS = {"eurosat": ("AnnualCrop", "Forest", "River"), "mnist": ("0", "1")}


def read(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    read(ROOT / "benchmarks" / "tiny_clip.py").write(folder, TASKS, side=16, depth=1)
    return folder


def small(models, **changes):
    """The tiny form of the suite at the size of a test."""
    config = read(ROOT / "configs" / "suites" / "clip8.py").get_config("tiny,methods=average()")
    config.unlock()
    config.data.tasks, config.data.size = TASKS, 16
    config.model.weights, config.model.experts = f"{models}/base", f"{models}/{{task}}"
    config.training.multi_task.steps = 1
    config.calibration.examples, config.compressions = 4, ()
    config.cells = {"mean": {"model": "average()", "published": 25.0, "source": "nowhere"}}
    config.update(changes)
    return config.lock()


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def fed(pixels):
    """What transformers' model is given for images as bytes."""
    x = (pixels / 255 - np.array(zero_shot.MEAN)) / np.array(zero_shot.DEVIATION)
    return torch.from_numpy(np.float32(x.transpose(0, 3, 1, 2)))


@torch.no_grad()
def scored(model, folder, pixels, classes):
    """The cosines of images and of each class' mean sentence, times the scale, by transformers."""
    words = tokenizers.Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))

    def direction(sentence):
        ids = torch.tensor([words.encode(sentence).ids])
        pooled = model.text_projection(model.text_model(ids).pooler_output)
        return pooled[0] / pooled.norm()

    rows = [torch.stack([direction(text) for text in several]).mean(0) for several in classes]
    kernel = torch.stack([row / row.norm() for row in rows])
    found = model.visual_projection(model.vision_model(pixel_values=fed(pixels)).pooler_output)
    return model.logit_scale.exp() * found / found.norm(dim=1, keepdim=True) @ kernel.T


def test_scores_are_those_of_transformers_for_base_and_expert(models):
    config = small(models)
    sentences = {task: clip.sentences(task, LABELS[task]) for task in TASKS}
    assert sentences["mnist"] == [['a photo of the number: "0".'], ['a photo of the number: "1".']]
    heads = bodies.heads(config.model, sentences)
    model = bodies.build(config.model)
    theirs = transformers.CLIPModel.from_pretrained(models / "base").eval()
    pixels = images(5)
    for task in TASKS:
        own = train.logits(model, bodies.pretrained(config.model), heads[task], pixels)
        wanted = scored(theirs, models, pixels, sentences[task])
        np.testing.assert_allclose(own, wanted, rtol=1e-5, atol=1e-4)  # 14 times a cosine
    expert = transformers.CLIPVisionModel.from_pretrained(models / "mnist")
    state = {name.removeprefix("vision_model."): x for name, x in expert.state_dict().items()}
    theirs.vision_model.load_state_dict(state)
    own = train.logits(model, bodies.expert(config.model, "mnist"), heads["mnist"], pixels)
    wanted = scored(theirs, models, pixels, sentences["mnist"])
    np.testing.assert_allclose(own, wanted, rtol=1e-5, atol=1e-4)


def test_images_are_cut_as_transformers_does():
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    for shape in ((20, 31, 3), (33, 17, 3), (9, 12, 3)):
        picture = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        wanted = np.asarray(processor(picture, return_tensors="np")["pixel_values"])[0]
        own = fed(clip.crop(picture, 16)[None]).numpy()[0]
        assert abs(own - wanted).max() < 1.01 / 255 / 0.26  # one of 256 steps, after rounding


def test_a_suite_of_given_experts_puts_its_numbers_beside_published_ones(
    models, tmp_path, monkeypatch
):
    def task(name):
        labels = LABELS[name]
        parts = {
            part: Split(images(6, seed), np.arange(6, dtype=np.int32) % len(labels))
            for seed, part in enumerate(("train", "validation", "test"))
        }
        return Task(name=name, labels=labels, head=name, **parts)

    monkeypatch.setattr(data, "load", lambda config, *_: {name: task(name) for name in TASKS})
    book = workdir.Logbook(progress.Printer(io.StringIO()))
    origin = {"file": "clip8.py", "argument": "tiny", "overrides": {}}
    config = small(models)
    results = experiment.run(config, tmp_path, book, origin)
    rows = seeds.summarise(config.name, {0: results})["models"]
    assert {row["kind"] for row in rows} >= {"base", "own", "merge", "ensemble", "multi_task"}
    (cell,) = published.compare(rows, config.cells)
    accuracy = next(row["mean"]["mean"] for row in rows if row["name"] == "average()")
    assert cell["difference"] == pytest.approx(100 * accuracy - 25, abs=0.06)
    text = sections.markdown(published.section([cell]))
    assert f"| mean | average() | 25.0 | {100 * accuracy:.1f} |" in text


@pytest.mark.parametrize(("model", "count"), [("b32", 8), ("b16", 14), ("l14", 20)])
def test_cells_are_complete_and_of_models_that_are_run(model, count):
    config = read(ROOT / "configs" / "suites" / "clip8.py").get_config(
        f"model={model},tasks={count}"
    )
    published.check(config.cells)
    assert len(config.data.tasks) == len(set(config.data.tasks)) == count
    assert {"base", "own"} <= set(config.cells)
    for cell in config.cells.values():
        assert cell["model"] in (*config.methods, "base", "own", "ensemble")
    assert all("{}" in t for task in config.data.tasks for t in clip.TASKS[task].templates)
    assert len(clip.TRAFFIC_SIGNS) == len(set(clip.TRAFFIC_SIGNS)) == 43


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ""}, "config.cells.mean: it has no 'source'"),
        ({"published": 250}, "published must be an accuracy in %, from 0 to 100, not 250"),
    ],
)
def test_a_cell_that_does_not_say_everything_is_one_sentence(models, tmp_path, changes, message):
    config = small(models).copy_and_resolve_references().unlock()
    config.cells.mean.update(changes)
    with pytest.raises(mj.MergeError) as raised:
        suite.check(config, tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_experts_of_another_base_and_models_that_are_no_clip_are_one_sentence(models, tmp_path):
    read(ROOT / "benchmarks" / "tiny_clip.py").write(tmp_path, ("mnist",), side=8, depth=1)
    settings = {"kind": "clip", "weights": f"{models}/base", "experts": f"{tmp_path}/{{task}}"}
    with pytest.raises(mj.MergeError, match=r"is no expert of .* its shapes differ in 'vision/p"):
        bodies.expert(settings, "mnist")
    with pytest.raises(mj.MergeError, match="VisionEncoder, where a CLIPModel with both"):
        bodies.build({**settings, "weights": f"{models}/mnist"})
