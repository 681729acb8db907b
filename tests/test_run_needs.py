"""The resources that a run needs are reported before it starts, and a run that does not fit is refused."""

import pytest
import torch
from tiny_models import tiny_model
from tiny_training import make_trainer

from trainer import run_needs
from trainer.backbones import freeze_layers
from trainer.run_needs import (
    GIB,
    RunNeeds,
    TimeEstimate,
    available_memory,
    check_fits,
    estimate_run,
    free_disk_space,
)


def needs_of(model, **changes):
    values = {"num_steps": 10, "num_tokens": 1000, "batch_size": 8, "max_length": 16, **changes}
    return estimate_run(model.config.backbone_config, model.config.num_labels, **values)


@pytest.mark.parametrize("num_frozen_layers", [0, 1])
def test_the_memory_of_weights_and_optimizer_is_that_of_the_model(num_frozen_layers):
    model = tiny_model(num_labels=500)
    model.label_embeddings.requires_grad_(True)
    freeze_layers(model.backbone, num_frozen_layers)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in model.parameters())
    found = needs_of(model, num_frozen_layers=num_frozen_layers)
    assert found.state_bytes == pytest.approx(4 * whole + 12 * trained, rel=0.1)


def test_a_batch_needs_more_memory_with_more_documents_tokens_and_bits():
    model = tiny_model(num_labels=50)
    first = needs_of(model).batch_bytes
    assert needs_of(model, batch_size=16).batch_bytes == 2 * first
    assert needs_of(model, half_precision=True).batch_bytes < first < needs_of(model, max_length=32).batch_bytes


def test_checkpoints_take_disk_space(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=2)
    trainer.train()
    (folder,) = tmp_path.glob("checkpoint-*")
    written = sum((folder / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    model, none = trainer.model, needs_of(trainer.model, train_label_embeds=False)
    one = needs_of(model, num_checkpoints=1, train_label_embeds=False)
    assert one.disk_bytes - none.disk_bytes == pytest.approx(written, rel=0.25)


@pytest.mark.parametrize("memory, disk, word", [(3, 9, "optimizer need 4.0 GiB"), (9, 4, "need 5.0 GiB of disk")])
def test_a_run_that_cannot_fit_is_refused(memory, disk, word):
    needs = RunNeeds(1, 1, state_bytes=4 * GIB, batch_bytes=0, disk_bytes=5 * GIB)
    with pytest.raises(ValueError, match=word):
        check_fits(needs, memory * GIB, disk * GIB)
    check_fits(needs, 4 * GIB, 5 * GIB)
    check_fits(needs, None, 5 * GIB)


def test_the_kernel_of_lexical_scores_must_fit_next_to_the_weights_or_into_main_memory():
    needs = RunNeeds(1, 1, state_bytes=4 * GIB, batch_bytes=0, disk_bytes=0, kernel_bytes=2 * GIB)
    with pytest.raises(
        ValueError, match="2.0 GiB of memory after training, in addition to 4.0 GiB .* but 5.0 GiB are"
    ):
        check_fits(needs, 5 * GIB, GIB)
    check_fits(needs, 6 * GIB, GIB)
    with pytest.raises(ValueError, match="2.0 GiB of memory after training, but 1.0 GiB are free"):
        check_fits(needs, 5 * GIB, GIB, main_memory=GIB)
    check_fits(needs, 5 * GIB, GIB, main_memory=2 * GIB)


def test_a_requested_cache_must_fit_in_addition_to_the_checkpoints():
    needs = needs_of(tiny_model(), num_cached_tokens=100)
    assert needs.cache_bytes == 100 * 4 * tiny_model().config.backbone_config.hidden_size
    assert needs_of(tiny_model(), num_cached_tokens=100, half_precision=True).cache_bytes * 2 == needs.cache_bytes
    both = needs.disk_bytes + needs.cache_bytes
    check_fits(needs, None, both - 1)
    check_fits(needs, None, both, must_cache=True)
    with pytest.raises(ValueError, match="states of the frozen layers need"):
        check_fits(needs, None, both - 1, must_cache=True)


def test_free_memory_and_disk_space_are_those_of_the_machine_or_container(tmp_path, monkeypatch):
    free = available_memory()
    assert 0 < free <= run_needs.psutil.virtual_memory().total
    assert free_disk_space(tmp_path / "new" / "folder") > 0
    for name, content in (("memory.max", "5000"), ("memory.current", "4000"), ("memory.stat", "inactive_file 500\n")):
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(run_needs, "CGROUP", tmp_path)
    assert available_memory(torch.device("cpu")) == 1500
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() > 5000


def test_the_time_is_reported_once_after_a_few_steps(tmp_path, capsys):
    seconds = iter(range(0, 10_000, 20))
    estimate = TimeEstimate(clock=lambda: next(seconds))
    make_trainer(tmp_path, callbacks=[estimate], max_steps=12).train()
    told = [line for line in capsys.readouterr().out.splitlines() if "of training left" in line]
    assert len(told) == 1
    # 20 seconds per step; 40 seconds have passed since the first step.
    assert told[0].startswith("Step 3 of 12: about 3 minutes") and "of memory in use" in told[0]


def test_short_runs_report_no_time(tmp_path, capsys):
    make_trainer(tmp_path, callbacks=[TimeEstimate()], max_steps=2).train()
    assert "of training left" not in capsys.readouterr().out


@pytest.mark.parametrize("size", [32, 8])
def test_token_attention_takes_memory_for_its_weights_and_scores(size):
    model = tiny_model(num_labels=500)
    attends = tiny_model(num_labels=500, token_attention=True, token_attention_size=size)
    added = sum(one.numel() for one in attends.parameters()) - sum(one.numel() for one in model.parameters())
    without, found = needs_of(model), needs_of(model, token_attention_size=size)
    assert found.state_bytes - without.state_bytes == 16 * added
    assert found.batch_bytes > without.batch_bytes
