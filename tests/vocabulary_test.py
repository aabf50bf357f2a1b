"""Vocabularies that differ: rows are aligned by token, and transformers loads what comes out."""

import json

import disk_models
import numpy as np
import pytest
from safetensors.numpy import load_file

import mergejax as mj
from mergejax import command

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

BASE = ["<unk>", "red", "green", "blue", "sky", "sea"]


def tokenizer(tokens, added=()):
    model = tokenizers.models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(list(added))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def save(folder, seed, tokens, added=(), rows=None, tied=False):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=rows or len(tokens) + len(added),
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer(tokens, added).save_pretrained(folder)
    return model


def state(model):
    return {name: x.detach().numpy() for name, x in model.state_dict().items()}


def logits(model, text, words):
    with torch.no_grad():
        return model(**words(text, return_tensors="pt", return_token_type_ids=False)).logits


def opened(folder):
    words = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), words


@pytest.mark.parametrize("tied", [False, True])
def test_rows_follow_their_tokens(tied, tmp_path):
    moved = ["<unk>", "sea", "blue", "moon", "red", "green", "sky", "sun"]
    base = state(save(tmp_path / "base", 0, BASE, tied=tied))
    a = state(save(tmp_path / "a", 1, moved, tied=tied))
    b = state(save(tmp_path / "b", 2, BASE[:-1], tied=tied))
    out = mj.merge_checkpoints(
        "task_arithmetic(scaling=0.5)", tmp_path / "base", [tmp_path / "a", tmp_path / "b"],
        tmp_path / "out", vocabulary="base",
    )  # fmt: skip
    model, words = opened(out)
    found = state(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for row, token in enumerate(BASE):
            other = b[name][row] if token != "sea" else base[name][row]
            sides = (a[name][moved.index(token)] - base[name][row], other - base[name][row])
            expected = base[name][row] + 0.5 * (sides[0] + sides[1])
            np.testing.assert_allclose(found[name][row], expected, rtol=1e-5, atol=1e-7)
    assert model.config.vocab_size == 6
    assert torch.isfinite(logits(model, "red sky", words)).all()


def test_added_tokens_keep_their_rows_in_a_union(tmp_path, capsys):
    """A chat vector onto a model whose vocabulary was extended."""
    save(tmp_path / "base", 0, BASE, rows=8)  # two rows without a token
    grown = save(tmp_path / "grown", 1, BASE, ["luna", "sol", "mar"])
    save(tmp_path / "chat", 2, BASE, ["<|user|>", "luna"])
    arguments = [
        "--base", tmp_path / "base", "--expert", tmp_path / "grown", "--expert", tmp_path / "chat",
        "--method", "chat_vector()", "--out", tmp_path / "out",
    ]  # fmt: skip
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        command.launch([str(x) for x in ["merge", *arguments, "--vocabulary", "union"]])
    out, err = capsys.readouterr()
    assert (status.value.code, err) == (0, "")
    assert "the vocabulary has 10 rows; 'base' has 8, 2 of them without a token" in out
    assert "'grown' shares 6 tokens, adds 3 tokens ('luna', 'sol', 'mar')" in out
    assert "'chat' shares 6 tokens, adds 2 tokens ('<|user|>', 'luna')" in out
    model, words = opened(tmp_path / "out")
    assert model.config.vocab_size == 10
    assert [words.convert_tokens_to_ids(t) for t in ("luna", "sol", "mar", "<|user|>")] == [
        6, 7, 8, 9,
    ]  # fmt: skip
    rows, own = state(model), state(grown)
    chat = state(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "chat"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert np.array_equal(rows[name][7:9], own[name][7:9])  # only one model has them
        assert np.array_equal(rows[name][9], chat[name][6])
        both = (own[name][6] + chat[name][7]) / 2
        np.testing.assert_allclose(rows[name][6], both, rtol=1e-6)
    # The forward pass is that of the tensors merged by hand.
    by_hand = transformers.LlamaForCausalLM(model.config)
    base = state(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    merged = {name: own[name] + (chat[name] - base[name]) for name in base if "layers" in name}
    by_hand.load_state_dict(
        {name: torch.tensor(merged.get(name, x)) for name, x in rows.items()}
        | {"model.norm.weight": torch.tensor(rows["model.norm.weight"])}
    )
    torch.testing.assert_close(
        logits(model, "luna red <|user|> sea", words),
        logits(by_hand, "luna red <|user|> sea", words),
    )


def test_rows_without_a_token_are_said_and_not_cut(tmp_path):
    base = state(save(tmp_path / "base", 0, BASE, rows=8))
    save(tmp_path / "a", 1, BASE)
    out = mj.merge_checkpoints(
        "task_arithmetic()", tmp_path / "base", [tmp_path / "a"], tmp_path / "out",
        vocabulary="base",
    )  # fmt: skip
    found = state(opened(out)[0])["model.embed_tokens.weight"]
    assert found.shape == (8, 16)
    assert np.array_equal(found[6:], base["model.embed_tokens.weight"][6:])


def refused(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        command.launch([str(argument) for argument in arguments])
    assert status.value.code == 2
    return capsys.readouterr().err


def test_a_choice_is_needed(tmp_path, capsys):
    save(tmp_path / "base", 0, BASE)
    save(tmp_path / "a", 1, BASE, ["luna"])
    save(tmp_path / "b", 2, ["<unk>", "green", "red", *BASE[3:]])
    start = ["check", "--base", tmp_path / "base", "--method", "average()"]
    err = refused(capsys, *start, "--expert", tmp_path / "a")
    assert "expert 'a' has another vocabulary: 'model.embed_tokens.weight' of 7 rows" in err
    assert "--vocabulary base or union" in err
    err = refused(capsys, *start, "--expert", tmp_path / "b")
    assert "'b' has 2 tokens at other rows than 'base', such as 'green' at 1 instead of 2" in err
    err = refused(capsys, *start, "--expert", tmp_path / "b", "--vocabulary", "unio")
    assert "'unio' is no choice, did you mean 'union'?" in err


def test_a_model_without_a_tokenizer_is_named(tmp_path, capsys):
    base = disk_models.write(tmp_path / "base", disk_models.weights(0))
    other = disk_models.write(tmp_path / "a", disk_models.weights(1, rows=12))
    (base / "vocab.json").write_text(json.dumps({"x": 0}))
    err = refused(
        capsys, "check", "--base", base, "--expert", other, "--method", "average()",
        "--vocabulary", "union",
    )  # fmt: skip
    assert err.startswith("'a' has another vocabulary, and no tokenizer.json")
    assert len(err.splitlines()) == 1


def test_tokens_that_were_renamed_in_place_are_told(tmp_path, capsys):
    save(tmp_path / "base", 0, BASE)
    save(tmp_path / "a", 1, [*BASE[:2], "lime", *BASE[3:]])
    flags = ["--base", tmp_path / "base", "--expert", tmp_path / "a", "--method", "linear()"]
    assert command.run(["check", *map(str, flags), "--out", str(tmp_path / "out")]) == 0
    assert (
        "expert 'a' has 1 other tokens than 'base' at the same rows, such as 'lime' instead of "
        "'green' at 2"
    ) in capsys.readouterr().err
    strict = ["merge", *map(str, flags), "--out", str(tmp_path / "out"), "--strict"]
    with pytest.raises(mj.MergeError, match="'lime' instead of 'green'"):
        command.run(strict)


def sentences(folder, seed, words, size):
    """A model whose tokenizer is a SentencePiece model and nothing else."""
    package = pytest.importorskip("sentencepiece", reason="it reads tokenizer.model")
    text = folder / "text"
    save(folder, seed, BASE, rows=size)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    text.write_text("\n".join(words))
    package.SentencePieceTrainer.Train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=size,
        model_type="word", bos_id=-1, eos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    text.unlink()


def test_tokens_that_cannot_be_read_are_told(tmp_path, capsys):
    save(tmp_path / "base", 0, BASE)
    save(tmp_path / "a", 1, BASE)
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    flags = ["--base", tmp_path / "base", "--expert", tmp_path / "a", "--method", "linear()"]
    assert command.run(["check", *map(str, flags), "--out", str(tmp_path / "out")]) == 0
    assert "the tokens of expert 'a' cannot be compared: " in capsys.readouterr().err


def test_rows_follow_the_tokens_of_sentencepiece_models(tmp_path):
    sentences(tmp_path / "base", 0, ["red red red", "green green", "blue"], 4)
    sentences(tmp_path / "a", 1, ["sky sky sky sky", "red red red", "green green", "blue"], 5)
    out = mj.merge_checkpoints(
        "passthrough()", tmp_path / "base", [tmp_path / "a"], tmp_path / "out", vocabulary="base"
    )
    name = "model.embed_tokens.weight"
    base, a, merged = (load_file(f / "model.safetensors")[name] for f in (
        tmp_path / "base", tmp_path / "a", out))  # fmt: skip
    # <unk>, red, green, blue; a has sky before red.
    np.testing.assert_array_equal(merged, a[[0, 2, 3, 4]])
    assert merged.shape == base.shape
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(mj.MergeError, match="is no SentencePiece model"):
        mj.merge_checkpoints(
            "passthrough()", tmp_path / "base", [tmp_path / "a"], tmp_path / "b", vocabulary="base"
        )
