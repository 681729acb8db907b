"""LoRA adapters are trained in the place of the encoder's weights, saved merged, and resumed exactly."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_batch, tiny_model
from tiny_training import NUM_LABELS, make_trainer, tiny_documents
from transformers import AutoModelForSequenceClassification

from trainer import add_lora_adapters
from trainer.adapters import ADAPTERS_NAME, lora_rank
from trainer.backbones import freeze_layers


peft = pytest.importorskip("peft")
SETTINGS = {"label_encoding": "embedding", "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


def adapted(frozen=0, rank=4, seed=0, **kwargs):
    model = tiny_model(num_labels=NUM_LABELS, classifier="mlp+similarity", **kwargs)
    freeze_layers(model.backbone, frozen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_lora_adapters(model, rank)
    return model


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_checkpoint_has_the_merged_weights_and_the_answers_of_the_trained_model(tmp_path, kind):
    model, plain = adapted(kind=kind), tiny_model(num_labels=NUM_LABELS, classifier="mlp+similarity", kind=kind)
    trainer = make_trainer(tmp_path, model=model, max_steps=4, **SETTINGS)
    trainer.train()
    trainer.save_model()
    assert set(load_file(tmp_path / "model.safetensors")) == set(plain.state_dict())
    assert not (tmp_path / ADAPTERS_NAME).exists()
    weights = [*tmp_path.rglob("*.safetensors")]
    assert tmp_path / "checkpoint-4" / ADAPTERS_NAME in weights
    usual = (tmp_path / "config.json").stat().st_mode
    assert {path.stat().st_mode for path in weights} == {usual}
    batch = tiny_batch(num_labels=NUM_LABELS)
    trained = model.eval()(**batch).logits
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        torch.testing.assert_close(loaded(**batch).logits, trained, rtol=1e-4, atol=1e-5)
    before, after = plain.state_dict(), loaded.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("backbone" in name for name in changed) and any("classifier" in name for name in changed)
    assert all(before[name].dim() == 2 for name in changed if "backbone" in name)  # no bias, no norm
    assert "label_embeddings" in changed


def test_frozen_layers_get_no_adapter(tmp_path):
    model = adapted(frozen=1)
    names = [name for name, parameter in model.named_parameters() if "lora" in name]
    assert names and all("layer.1." in name for name in names) and lora_rank(model) == 4
    with pytest.raises(ValueError, match="no trainable linear layer"):
        adapted(frozen=2)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    make_trainer(tmp_path / "whole", model=adapted(), max_steps=6, **SETTINGS).train()
    trainer = make_trainer(tmp_path / "cut", model=adapted(), max_steps=6, **SETTINGS)
    step = trainer.training_step

    def stopped(*args):
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt
        return step(*args)

    trainer.training_step = stopped
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    make_trainer(tmp_path / "cut", model=adapted(seed=1), max_steps=6, **SETTINGS).train(resume_from_checkpoint=True)
    ends = [load_file(tmp_path / name / "checkpoint-6" / "model.safetensors") for name in ("whole", "cut")]
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    with pytest.raises(ValueError, match="`lora_rank` 4 then, 2 now"):
        make_trainer(tmp_path / "cut", model=adapted(rank=2), max_steps=6, **SETTINGS).train(
            resume_from_checkpoint=True
        )
    with pytest.raises(ValueError, match="does not hold the adapters of this model"):
        make_trainer(tmp_path / "cut", model=adapted(frozen=1), max_steps=6, **SETTINGS).train(
            resume_from_checkpoint=True
        )


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    best |= {"greater_is_better": True}  # not the last one, as the loss falls
    model = adapted()
    trainer = make_trainer(tmp_path, model=model, documents=tiny_documents(48), max_steps=6, **SETTINGS, **best)
    trainer.train()
    assert trainer.state.best_global_step < 6
    batch = tiny_batch(num_labels=NUM_LABELS)
    loaded = type(model).from_pretrained(trainer.state.best_model_checkpoint)
    torch.testing.assert_close(model.eval()(**batch).logits, loaded(**batch).logits, rtol=1e-4, atol=1e-5)


def test_wrong_ranks_and_second_adapters_are_refused():
    with pytest.raises(ValueError, match="`rank` is 0"):
        adapted(rank=0)
    with pytest.raises(ValueError, match="already has adapters of rank 4"):
        add_lora_adapters(adapted(), 4)
