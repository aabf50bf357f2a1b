"""Text sets as tasks of a pre-trained encoder: tokens, padding, training from given weights."""

import contextlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import mergejax as mj
from mergejax import calibration, data, train
from mergejax.data import Split, corrupt, texts
from mergejax.models import bert, bodies, sentence

tfds = pytest.importorskip("tensorflow_datasets")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", "film", "a", "the", "plot"]
CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
TEXTS = ["a good film", "bad plot", "the film a bad plot the plot", "good"]


class Quiet:
    def log(self, text):
        pass

    def progress(self, description, total):
        return contextlib.nullcontext(lambda n: None)


def save(folder, settings):
    module = mj.models.build(settings)
    variables = module.init(jax.random.key(0), jnp.zeros([1, 4], jnp.int32))
    mj.models.save(folder, variables, settings)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a small random BERT with a tokenizer of ten words."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(folder, CONFIG)
    words = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def prepare(folder, name, features, records):
    """Writes a set of TFDS with a train and a test part."""

    class Set(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {part: iter(enumerate(records)) for part in ("train", "validation", "test")}

        def _generate_examples(self):
            """Unused, since the splits are generators already."""

    Set.name = name
    Set(data_dir=folder, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    text, number = tfds.features.Text(), tfds.features.Scalar(np.int32)
    label = tfds.features.ClassLabel(names=["objective", "subjective"])
    many = [{"text": TEXTS[i % 4], "label": i % 2} for i in range(40)]
    prepare(folder, "subj", {"text": text, "label": label}, many)
    plain = [{"text": TEXTS[i % 4], "intent": i % 3} for i in range(12)]
    prepare(folder, "clinc_oos", {"text": text, "intent": number}, plain)
    return str(folder)


def config(data_dir, encoder, *tasks):
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "data_dir": data_dir,
            "data": {
                "suite": "texts",
                "tasks": tasks,
                "length": 6,
                "limits": {"train": 30, "validation": 4, "test": 8},
            },
            "model": {"kind": "sentence_encoder", "weights": encoder},
            "training": {
                phase: {"steps": 3, "learning_rate": 1e-2, "batch": 4}
                for phase in ("heads", "finetune", "multi_task")
            },
            "calibration": {"examples": 6, "batch": 3, "estimator": "sampled"},
        }
    )


def test_texts_are_cut_as_the_tokenizer_does(encoder):
    cut = texts.cutter(encoder, 6)
    assert cut(["a good dog"]).tolist() == [1, 7, 4, 3, 2, -1]
    assert cut(["the film a bad plot the plot"]).tolist() == [1, 8, 6, 7, 5, 2]
    assert cut(["good", "bad"]).tolist() == [1, 4, 2, 5, 2, -1]
    read = data.reader(config("", encoder))
    assert read(["good", ("good", "bad")]).tolist() == [[1, 4, 2, -1, -1, -1], [1, 4, 2, 5, 2, -1]]


def test_text_sets_become_tasks_with_or_without_names_of_their_labels(data_dir, encoder, tmp_path):
    tasks = data.load(config(data_dir, encoder, "subj", "clinc"), tmp_path, Quiet())
    assert tasks["subj"].labels == ("objective", "subjective")
    assert tasks["clinc"].labels == ("0", "1", "2")
    assert {part: len(getattr(tasks["subj"], part)) for part in data.sources.PARTS} == {
        "train": 30,
        "validation": 4,
        "test": 8,
    }
    cut = texts.cutter(encoder, 6)
    for task in tasks.values():
        assert task.test.inputs.dtype == np.int32
        known = {tuple(cut([text]).tolist()) for text in TEXTS}
        assert {tuple(row) for row in task.test.inputs.tolist()} == known


def test_features_are_the_mean_of_the_real_tokens_whatever_the_padding(encoder):
    model, params = bodies.build(config("", encoder).model), sentence.pretrained(encoder)
    assert "pooler" not in params["encoder"]
    tokens = np.array([[1, 7, 4, 2, -1, -1], [1, 8, 6, 7, 5, 2]], np.int32)
    found = model.apply({"params": params}, tokens)
    alone = model.apply({"params": params}, tokens[:1, :4])
    np.testing.assert_allclose(found[:1], alone, atol=1e-6)
    states, _ = bert.Encoder(model.config).apply({"params": params["encoder"]}, tokens[1:])
    np.testing.assert_allclose(found[1], np.asarray(states)[0].mean(0), atol=1e-6)


def test_experts_start_from_the_weights_that_the_model_comes_with(data_dir, encoder, tmp_path):
    settings = config(data_dir, encoder, "subj")
    tasks = data.load(settings, tmp_path, Quiet())
    trained = train.train_all(settings, tasks, tmp_path, Quiet())
    jax.tree.map(np.testing.assert_array_equal, trained.base, sentence.pretrained(encoder))
    moved = jax.tree.map(
        lambda a, b: float(abs(a - b).max()), trained.base, trained.experts["subj"]
    )
    assert 0 < max(jax.tree.leaves(moved)) < 0.1  # three steps of at most 0.01
    gram = calibration.statistics(
        ["gram"], settings.calibration, tasks, trained, tmp_path, Quiet()
    )["gram"][0]
    rows = tasks["subj"].train.inputs[:6]
    states = hidden(trained, rows)[rows >= 0]
    key = gram["encoder"]["block_0"]["attention"]["key"]["kernel"]
    np.testing.assert_allclose(key, states.T @ states / len(states), rtol=1e-5, atol=1e-6)


def hidden(trained, rows):
    """What goes into the first block of the expert: embeddings, normalised; float64."""
    body = trained.experts["subj"]["encoder"]
    x = np.float64(body["tokens"]["embedding"])[np.where(rows < 0, 0, rows)]
    x += np.float64(body["positions"]["embedding"])[None, : rows.shape[1]]
    x += np.float64(body["token_types"]["embedding"])[:1]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    return x * np.float64(body["embedding_norm"]["scale"]) + np.float64(
        body["embedding_norm"]["bias"]
    )


def test_corrupted_texts_keep_their_ends_and_lose_or_swap_words_only():
    rng = np.random.default_rng(0)
    tokens = np.full([50, 12], -1, np.int32)
    for row in tokens:
        length = rng.integers(3, 13)
        row[:length] = [1, *rng.integers(4, 100, length - 2), 2]
    split = Split(tokens, np.arange(50, dtype=np.int32))
    dropped, swapped = (corrupt.corrupted(split, kind, 0).inputs for kind in corrupt.TEXTS)
    for before, less, mixed in zip(tokens, dropped, swapped, strict=True):
        before, less, mixed = (row[row >= 0].tolist() for row in (before, less, mixed))
        assert (less[0], less[-1], mixed[0], mixed[-1]) == (1, 2, 1, 2)
        words = iter(before)
        assert all(word in words for word in less)  # in their order
        assert sorted(mixed) == sorted(before)
    assert 0.75 < (dropped >= 0).sum() / (tokens >= 0).sum() < 0.97
    assert 0.05 < (swapped != tokens).mean() < 0.4
    with pytest.raises(KeyError):
        corrupt.corrupted(split, "blur", 0)


def test_weights_that_are_no_encoder_are_one_sentence(encoder, tmp_path):
    with pytest.raises(mj.MergeError, match="no package 'no_such_package'"):
        bodies.build({"kind": "sentence_encoder", "weights": "no_such_package"})
    with pytest.raises(mj.MergeError, match="there is no tokenizer"):
        texts.cutter(str(tmp_path), 6)
    save(tmp_path / "other", {**CONFIG, "architectures": ["BertForTokenClassification"]})
    with pytest.raises(mj.MergeError, match="is a TokenClassifier, where the body of a BERT"):
        bodies.build({"kind": "sentence_encoder", "weights": str(tmp_path / "other")})
