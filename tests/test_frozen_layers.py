"""Frozen lower layers are computed once and read from disk afterward."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, KINDS, tiny_batch, tiny_model
from tiny_training import NUM_LABELS, make_trainer
from transformers import TrainerCallback

from trainer.backbones import encoder_layers, freeze_layers
from trainer.frozen_layers import (
    FOLDER,
    FrozenLayersCache,
    cached_frozen_layers,
    caches_states,
    can_store_states,
    num_frozen_layers,
)


# Short texts that are used to determine which layers are frozen, for the cache and for the trainer, and whether their states can be stored.
NUM_PROBES = 5


def rows_of(batch):
    return [row[kept.bool()].tolist() for row, kept in zip(batch["input_ids"], batch["attention_mask"])]


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *ignored: calls.append(1))
    return calls


def frozen(kind="bert", num_layers=1, **kwargs):
    model = tiny_model(kind=kind, **kwargs)
    freeze_layers(model.backbone, num_layers)
    return model


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists what is mapped")
def test_the_states_do_not_count_as_memory_of_the_process(tmp_path):
    model, batch = frozen(), tiny_batch(6)
    cache = FrozenLayersCache(tmp_path, model.backbone).fill(rows_of(batch))
    with cache.attached():
        model(**batch)
        assert cache._stored is not None  # they were read
        assert str(cache.states_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
def test_stored_states_give_the_same_logits_and_gradients_as_computed_ones(kind, tmp_path):
    model, batch = frozen(kind), tiny_batch(6)

    def step():
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        return output.logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, expected_gradients = step()
    cache = FrozenLayersCache(tmp_path, model.backbone).fill(rows_of(batch))
    assert len(cache) == 6
    with cache.attached():
        step()  # from here on, the embeddings are not computed either
        logits, gradients = step()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "albert"])  # shares one layer
def test_encoders_whose_layers_need_more_than_the_states_below_are_found(kind):
    backbone = frozen(kind).backbone.train()
    assert can_store_states(backbone) == (kind not in ("t5", "xlnet"))
    assert backbone.training


def test_states_of_such_an_encoder_are_not_stored(tmp_path, caplog):
    def train(cached):
        model = frozen("t5")
        args = SimpleNamespace(
            cache_frozen_layers=cached, torch_compile=False, num_train_epochs=2, output_dir=tmp_path
        )
        with cached_frozen_layers(model.backbone, [], args) as cache:
            assert cache is None

    train(None)
    assert "'t5' cannot be stored" in caplog.text
    with pytest.raises(ValueError, match="'t5' cannot be stored: .* Leave out `cache_frozen_layers`"):
        train(True)


def test_the_frozen_layers_do_not_run_for_stored_documents(tmp_path):
    model, batch = frozen(), tiny_batch(4)
    attention = count_calls(encoder_layers(model.backbone)[0].attention)
    words = count_calls(model.backbone.embeddings.word_embeddings)
    cache = FrozenLayersCache(tmp_path, model.backbone).fill(rows_of(batch))
    del attention[:], words[:]
    with cache.attached():
        model(**batch)
        assert not attention and len(words) == 1  # determines the shape
        model(**batch)
        assert not attention and len(words) == 1
        model(**tiny_batch(4, seed=1))  # others are computed
        assert len(attention) == 1 and len(words) == 2
    model(**batch)
    assert len(attention) == 2 and len(words) == 3


def test_states_of_deberta_are_computed_in_autocast(tmp_path):
    cache = FrozenLayersCache(tmp_path, frozen("deberta").backbone)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(cache.fill([[2, 9, 3]])) == 1


def test_documents_without_stored_states_get_the_same_logits_and_no_dropout_below(tmp_path):
    model = frozen(hidden_dropout=0.5)
    for layer in encoder_layers(model.backbone)[1:]:
        for module in layer.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    batch = tiny_batch(4, seed=1)
    expected = model(**batch).logits
    cache = FrozenLayersCache(tmp_path, model.backbone).fill(rows_of(tiny_batch(4)))
    with cache.attached():
        torch.testing.assert_close(model(**batch).logits, expected)
        encoder_layers(model.backbone)[0].train()
        torch.testing.assert_close(model(**batch).logits, expected)
        assert encoder_layers(model.backbone)[0].training


def test_a_truncated_file_is_filled_again_and_other_weights_start_again(tmp_path):
    model, batch = frozen(), tiny_batch(6)
    rows = rows_of(batch)
    cache = FrozenLayersCache(tmp_path, model.backbone).fill(rows[:3])
    with open(cache.index_path, "ab") as file:
        file.write(b"torn")
    with open(cache.states_path, "ab") as file:
        file.write(b"states without an entry")
    expected = model(**batch).logits
    cache = FrozenLayersCache(tmp_path, model.backbone)
    computed = count_calls(encoder_layers(model.backbone)[0])
    cache.fill(rows, batch_size=6)
    assert len(cache) == 6 and len(computed) == 1
    with cache.attached():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    other = frozen(seed=1)
    assert len(FrozenLayersCache(tmp_path, other.backbone).fill(rows[:1])) == 1


def test_half_precision_takes_half_the_space(tmp_path):
    model, batch = frozen(), tiny_batch(6)
    full = FrozenLayersCache(tmp_path / "full", model.backbone).fill(rows_of(batch))
    half = FrozenLayersCache(tmp_path / "half", model.backbone, dtype="float16").fill(rows_of(batch))
    assert full.states_path.stat().st_size == 2 * half.states_path.stat().st_size == full.bytes_needed(rows_of(batch))
    expected = model(**batch).logits
    with half.attached():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-2, atol=1e-2)


def test_a_model_saved_while_states_are_read_is_whole(tmp_path):
    model = frozen()
    cache = FrozenLayersCache(tmp_path / "cache", model.backbone).fill(rows_of(tiny_batch(2)))
    names = set(model.state_dict())
    with cache.attached():
        model.save_pretrained(tmp_path / "saved")
        assert set(model.state_dict()) == names
    again = type(model).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(**tiny_batch(3)).logits, model(**tiny_batch(3)).logits)
    cache.delete()
    assert not (tmp_path / "cache").exists()


def test_how_many_layers_are_frozen():
    model = tiny_model()
    assert num_frozen_layers(model.backbone) == 0
    freeze_layers(model.backbone, 1)
    assert num_frozen_layers(model.backbone) == 1
    freeze_layers(model.backbone, 2)
    assert num_frozen_layers(model.backbone) == 2
    model.backbone.get_input_embeddings().requires_grad_(True)
    assert num_frozen_layers(model.backbone) == 0
    with pytest.raises(ValueError, match="`num_layers` is 0, but the encoder has 2 layers"):
        FrozenLayersCache("unused", model.backbone)


def test_the_disk_must_have_room(tmp_path):
    model = frozen()
    cache = FrozenLayersCache(tmp_path, model.backbone)
    assert cache.has_space_for([[1, 2, 3]])

    class Endless(list):
        def __len__(self):
            return 2**62 // cache.hidden_size // cache.dtype.itemsize

    assert not cache.has_space_for([Endless()])


def trained(folder, cache, num_train_epochs=4, **kwargs):
    model = frozen(num_labels=NUM_LABELS)
    trainer = make_trainer(
        folder, model, num_train_epochs=num_train_epochs, cache_frozen_layers=cache, eval_strategy="epoch",
        train_sampling_strategy="random", max_steps=-1, label_encoding="embedding", **kwargs,
    )  # fmt: skip
    computed = count_calls(encoder_layers(model.backbone)[0].attention)
    trainer.train()
    return trainer, len(computed)


@pytest.mark.numeric
def test_training_with_the_cache_learns_the_same_and_leaves_nothing_behind(tmp_path):
    plain, computed = trained(tmp_path / "plain", cache=False)
    cached, once = trained(tmp_path / "cached", cache=None)
    assert 0 < once - NUM_PROBES < computed / 2
    for (name, one), other in zip(plain.model.state_dict().items(), cached.model.state_dict().values(), strict=True):
        if not name.endswith("key.bias"):  # its gradient is rounding noise
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)
    losses = [[entry["eval_loss"] for entry in t.state.log_history if "eval_loss" in entry] for t in (plain, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert not (tmp_path / "cached" / FOLDER).exists()


def test_the_cache_survives_an_error_and_a_resumed_run_reads_it(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, cache=True, callbacks=[Stop()])
    assert (tmp_path / FOLDER / "index.bin").stat().st_size > 0
    _, computed = trained(tmp_path, cache=True)
    assert computed == NUM_PROBES


def test_states_are_kept_for_what_follows_training(tmp_path):
    model = frozen(num_labels=NUM_LABELS)
    trainer = make_trainer(tmp_path, model, label_encoding="embedding", cache_frozen_layers=True)
    attention = count_calls(encoder_layers(model.backbone)[0].attention)
    with trainer.cached_frozen_layers():
        trainer.train()
        del attention[:]
        kept = torch.cat([batch.logits for batch in trainer.logit_batches()])
        assert not attention
    assert not (tmp_path / FOLDER).exists()
    torch.testing.assert_close(
        torch.cat([batch.logits for batch in trainer.logit_batches()]), kept, rtol=1e-3, atol=1e-4
    )
    assert attention


def test_states_are_computed_in_the_precision_of_the_training(tmp_path):
    model = frozen(num_labels=NUM_LABELS)
    trainer = make_trainer(tmp_path, model, label_encoding="embedding", cache_frozen_layers=True, bf16=True)
    dtypes = set()
    dense = encoder_layers(model.backbone)[0].intermediate.dense
    dense.register_forward_hook(lambda module, arguments, output: dtypes.add(output.dtype))
    with trainer.cached_frozen_layers():
        assert dtypes == {torch.float32, torch.bfloat16}  # the first is the text that tells which layers are frozen


def test_a_cache_for_one_epoch_is_made_only_on_demand(tmp_path, monkeypatch):
    filled, fill = [], FrozenLayersCache.fill
    monkeypatch.setattr(FrozenLayersCache, "fill", lambda self, *a, **k: filled.append(1) or fill(self, *a, **k))
    trained(tmp_path / "auto", cache=None, num_train_epochs=1)
    assert not filled
    trained(tmp_path / "named", cache=True, num_train_epochs=1)
    assert filled


def test_without_room_for_a_cache_that_was_requested_nothing_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(FrozenLayersCache, "has_space_for", lambda *given: False)
    with pytest.raises(ValueError, match="states of the frozen layers need .* GiB"):
        trained(tmp_path / "named", cache=True)
    trainer, _ = trained(tmp_path / "auto", cache=None)
    assert trainer.state.global_step > 0


@pytest.mark.parametrize(
    "settings, cached",
    [
        ({"num_train_epochs": 3}, True),
        ({"num_train_epochs": 1}, False),
        ({"num_train_epochs": 1, "max_steps": 2}, True),
        ({"num_train_epochs": 1, "cache_frozen_layers": True}, True),
        ({"num_train_epochs": 3, "cache_frozen_layers": False}, False),
        ({"num_train_epochs": 3, "torch_compile": True}, False),
    ],
)
def test_which_runs_cache_states(settings, cached):
    values = {"num_train_epochs": 3, "max_steps": -1, "cache_frozen_layers": None, "torch_compile": False, **settings}
    assert caches_states(SimpleNamespace(**values)) == cached
