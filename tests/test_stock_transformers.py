"""The model behaves as transformers expects: Auto classes, loading, saving, precision, compilation, Trainer, pipeline."""

import json
import logging
import os
import stat

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_models import (
    KINDS,
    tiny_backbone,
    tiny_backbone_config,
    tiny_batch,
    tiny_candidates,
    tiny_model,
    tiny_tokenizer,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification


pytestmark = pytest.mark.numeric

WITHOUT_SDPA = ("deberta-v2", "mpnet")
COMPILED = ("bert", "roberta", "distilbert")
LABELS = ["stars", "images", "prices"]
WORDS = {"stars": ["star", "galaxy"], "images": ["image", "vision"], "prices": ["market", "price"]}


def loss_and_gradients(model, forward=None, **inputs):
    model.zero_grad()
    loss = (model if forward is None else forward)(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_loss_and_gradients(actual, expected, atol=1e-5, rtol=1e-3):
    torch.testing.assert_close(actual[0], expected[0], atol=atol, rtol=rtol)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, atol=atol, rtol=rtol, msg=name)


# --- configuration


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_survives_saving_with_every_field(tmp_path, kind):
    config = SepMldcConfig(
        backbone_config=tiny_backbone_config(kind),
        id2label=dict(enumerate(LABELS)),
        pooling="cls",
        classification_loss="bce+softmax",
        classifier="mlp+similarity",
        classifier_dropout=0.2,
        classifier_hidden_size=7,
        classifier_bias_init="prior",
        similarity_scale_init=5,
        label_attention=False,
        label_descriptions={"stars": "suns far away", "prices": "what things cost: « œuvre » ≤ 5 €"},
        thresholds=[0.1, 0.5, 0.25],
        threshold_info={"objective": "micro_f1", "documents": 100},
        score_calibration={"scale": 1.5, "bias": -0.25},
        label_counts=[10, 0, 3],
        num_train_documents=11,
    )
    config.save_pretrained(tmp_path)
    for loaded in (SepMldcConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is SepMldcConfig
        assert type(loaded.backbone_config) is type(config.backbone_config)
        saved, read = config.to_dict(), loaded.to_dict()
        assert {key for key in saved.keys() | read.keys() if read.get(key) != saved.get(key)} <= {
            "_name_or_path",
            "transformers_version",
        }
        assert loaded.labels == LABELS and loaded.problem_type == "multi_label_classification"


def test_the_text_configuration_is_the_encoders():
    config = tiny_model(kind="roberta").config
    assert config.get_text_config() is config.backbone_config
    assert config.get_text_config().vocab_size == len(tiny_tokenizer())
    assert config.hidden_size == config.backbone_config.hidden_size
    assert SepMldcConfig.sub_configs == {"backbone_config": AutoConfig}


def test_without_a_backbone_configuration_the_encoder_is_a_roberta_base():
    assert SepMldcConfig(num_labels=2).backbone_config.to_diff_dict()["model_type"] == "roberta"


# --- saving and loading


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_loads_from_the_meta_device_with_all_weights_and_buffers(tmp_path, kind):
    model = tiny_model(kind=kind, classifier="mlp+similarity", similarity_scale_init=7.0)
    torch.nn.init.normal_(model.classifier.bias)
    model.label_embeddings.requires_grad_(True)  # As after training with `label_encoding="embedding"`.
    model.save_pretrained(tmp_path)
    loaded, info = SepMldcForMultiLabelClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert not loaded.training and not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert {n for n, p in loaded.named_parameters() if not p.requires_grad} == {"label_embeddings"}
    batch = tiny_batch()
    for name, value in model(**batch).items():
        torch.testing.assert_close(loaded(**batch)[name], value, rtol=0, atol=1e-5, msg=name)


def test_a_model_can_be_built_on_the_meta_device():
    with torch.device("meta"):
        model = SepMldcForMultiLabelClassification(SepMldcConfig(backbone_config=tiny_backbone_config(), num_labels=3))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_weights_that_a_checkpoint_lacks_start_as_in_a_new_model(tmp_path):
    model = tiny_model(classifier="mlp", similarity_scale_init=7.0)
    torch.nn.init.normal_(model.classifier.bias)
    model.save_pretrained(tmp_path)
    loaded = SepMldcForMultiLabelClassification.from_pretrained(
        tmp_path, classifier="mlp+similarity", ignore_mismatched_sizes=True
    )
    assert loaded.classifier.similarity_scale.item() == 7.0
    assert torch.equal(loaded.classifier.bias, model.classifier.bias)
    assert torch.equal(loaded.label_embeddings, model.label_embeddings)


def test_the_auto_classes_know_the_model(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SepMldcConfig
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is SepMldcForMultiLabelClassification and not loaded.label_embeddings.requires_grad
        assert type(auto_class.from_config(model.config)) is SepMldcForMultiLabelClassification


def test_a_checkpoint_holds_safetensors_with_the_table_and_no_pickle(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir() if path.suffix != ".py"}
    assert files == {"config.json", "model.safetensors", "requirements.txt"}
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(weights["label_embeddings"], model.label_embeddings)
    assert weights.keys() == model.state_dict().keys()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_weight_files_have_the_permissions_of_any_new_file(tmp_path, mask):
    former = os.umask(mask)
    try:
        tiny_model().save_pretrained(tmp_path / "one")
        tiny_model().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    finally:
        os.umask(former)
    assert len(list(tmp_path.glob("shards/*.safetensors"))) > 1
    for path in tmp_path.glob("*/*.*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name


def test_a_checkpoint_names_the_classes_that_load_it_and_carries_their_code(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["SepMldcForMultiLabelClassification"]
    for auto_class, reference in config["auto_map"].items():
        module, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text(), auto_class
    assert config["auto_map"].keys() >= {"AutoConfig", "AutoModel", "AutoModelForSequenceClassification"}


@pytest.mark.parametrize("kind", ["bert", "modernbert", "deberta-v2"])
def test_a_model_with_resized_token_embeddings_survives_saving(tmp_path, kind):
    model = tiny_model(kind=kind)
    size = len(tiny_tokenizer()) + 5
    model.resize_token_embeddings(size)
    assert model.get_input_embeddings().num_embeddings == model.config.get_text_config().vocab_size == size
    model.save_pretrained(tmp_path)
    loaded = SepMldcForMultiLabelClassification.from_pretrained(tmp_path)
    batch = tiny_batch()
    batch["input_ids"][0, 1] = size - 1
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)
    assert loaded.config.backbone_config.vocab_size == size


def test_a_replaced_token_embedding_is_the_one_the_encoder_uses():
    model = tiny_model()
    replacement = torch.nn.Embedding(*model.get_input_embeddings().weight.shape)
    model.set_input_embeddings(replacement)
    assert model.get_input_embeddings() is replacement
    model(**tiny_batch()).loss.backward()
    assert replacement.weight.grad.any()


# --- attention implementations, precision, memory, compilation


@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_implementation_follows_the_encoder(tmp_path, kind):
    expected = "eager" if kind in WITHOUT_SDPA else "sdpa"
    model = tiny_model(kind=kind)
    assert model.backbone.config._attn_implementation == expected
    eager = tiny_model(kind=kind, attn_implementation="eager")
    assert eager.backbone.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(**tiny_batch()).logits, model(**tiny_batch()).logits, atol=1e-4, rtol=1e-4)
    folder = tiny_backbone(tmp_path, kind)
    from_backbone = SepMldcForMultiLabelClassification.from_backbone(
        folder, tiny_tokenizer(), LABELS, attn_implementation="eager"
    )
    assert from_backbone.backbone.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", WITHOUT_SDPA)
def test_asking_for_sdpa_where_the_encoder_has_none_raises_transformers_own_error(tmp_path, kind):
    message = "does not support an attention implementation through torch.nn.functional.scaled_dot_product_attention"
    with pytest.raises(ValueError, match=message):
        tiny_model(kind=kind, attn_implementation="sdpa")
    tiny_model(kind=kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        SepMldcForMultiLabelClassification.from_pretrained(tmp_path, attn_implementation="sdpa")


def test_an_encoder_without_sdpa_does_not_take_it_from_one_made_later():
    for kind, expected in [("mpnet", "eager"), ("bert", "sdpa"), ("deberta-v2", "eager"), ("roberta", "sdpa")]:
        assert tiny_model(kind=kind).backbone.config._attn_implementation == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mpnet"])
def test_gradient_checkpointing_recomputes_layers_and_gives_the_same_gradients(kind):
    model = tiny_model(kind=kind).train()
    inputs = {**tiny_batch(), **tiny_candidates(model, [2, 0])}
    calls = []
    layers = next(m for m in model.backbone.modules() if isinstance(m, torch.nn.ModuleList))
    # The layer's own hooks stay outside its checkpoint; those of what is in it do not.
    linear = next(m for m in layers[0].modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = loss_and_gradients(model, **inputs)
    once = len(calls)
    model.gradient_checkpointing_enable()
    checkpointed = loss_and_gradients(model, **inputs)
    assert len(calls) - once == 2 * once
    assert_same_loss_and_gradients(checkpointed, plain)


@pytest.mark.parametrize("kind, name", [("mpnet", "MPNetModel"), ("albert", "AlbertModel"), ("xlnet", "XLNetModel")])
def test_gradient_checkpointing_of_an_encoder_that_has_none_raises_an_error_that_names_the_encoder(kind, name):
    with pytest.raises(ValueError, match=f"not supported by {name}"):
        tiny_model(kind=kind).gradient_checkpointing_enable()


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_weights_give_a_float32_loss_near_the_full_precision_one(kind, tmp_path):
    model = tiny_model(kind=kind, classifier="mlp+similarity")
    inputs = {**tiny_batch(), **tiny_candidates(model, [2, 0])}
    expected = model(**inputs)
    model.save_pretrained(tmp_path)
    half = SepMldcForMultiLabelClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    loss, gradients = loss_and_gradients(half, **inputs)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.loss.item(), rel=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    out = half(**inputs)
    assert out.document_embeds.dtype == out.label_attention.dtype == torch.float32
    torch.testing.assert_close(out.label_attention, expected.label_attention, atol=0.1, rtol=0.0)


@pytest.mark.parametrize("classifier", ["mlp", "similarity", "mlp+similarity"])
def test_bf16_autocast_keeps_attention_and_loss_in_float32_near_the_full_precision_ones(classifier):
    model = tiny_model(classifier=classifier)
    inputs = {**tiny_batch(), **tiny_candidates(model, [2, 0])}
    expected = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs)
    out.loss.backward()
    assert out.loss.dtype == out.label_attention.dtype == out.document_embeds.dtype == torch.float32
    torch.testing.assert_close(out.label_attention.sum(dim=-1), torch.ones(4))
    torch.testing.assert_close(out.loss, expected.loss, atol=0.0, rtol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", COMPILED)
def test_forward_compiles_to_one_graph_with_the_same_loss_and_gradients(kind):
    torch.compiler.reset()
    model = tiny_model(kind=kind, classifier="mlp+similarity").train()
    inputs = {**tiny_batch(), **tiny_candidates(model, [2, 0])}
    expected = loss_and_gradients(model, **inputs)
    # `fullgraph` makes a graph break an error.
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same_loss_and_gradients(loss_and_gradients(model, compiled, **inputs), expected)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # Inductor calls a C++ compiler, which a busy machine makes slow.
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", COMPILED)
def test_forward_and_backward_compile(kind, backend):
    torch.compiler.reset()
    model = tiny_model(kind=kind, classifier="mlp+similarity").train()
    inputs = {**tiny_batch(), **tiny_candidates(model, [2, 0])}
    expected = loss_and_gradients(model, **inputs)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same_loss_and_gradients(loss_and_gradients(model, compiled, **inputs), expected)


# --- the stock Trainer and pipeline


def documents(n, seed):
    """Texts in which each label's words occur exactly when the document has the label."""
    rng = np.random.default_rng(seed)
    labels = rng.random((n, len(LABELS))) < 0.5
    texts = [
        " ".join(["the data of", *(rng.choice(WORDS[LABELS[j]]) for j in np.flatnonzero(row)), "model" * (i % 3)])
        for i, row in enumerate(labels)
    ]
    tokenizer = tiny_tokenizer()
    data = Dataset.from_dict({"text": texts, "labels": labels.astype(float).tolist()})
    return data.map(lambda row: tokenizer(row["text"], truncation=True), batched=True)


def arguments(folder, **kwargs):
    return TrainingArguments(folder, report_to="none", use_cpu=True, disable_tqdm=True, **kwargs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    model = tiny_model(id2label=dict(enumerate(LABELS)), classifier="mlp+similarity")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"accuracy": float(((prediction.predictions > 0) == prediction.label_ids).mean())}

    trainer = Trainer(
        model=model,
        args=arguments(
            folder / "run",
            num_train_epochs=10,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            eval_strategy="steps",
            eval_steps=80,
            save_steps=80,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            save_total_limit=1,
        ),
        train_dataset=documents(128, seed=0),
        eval_dataset=documents(48, seed=1),
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
        processing_class=tiny_tokenizer(),
        compute_metrics=compute_metrics,
    )
    before = trainer.evaluate()
    trainer.train()
    trainer.save_model(folder / "final")
    return {"trainer": trainer, "start": start, "seen": seen, "before": before, "folder": folder}


def test_the_stock_trainer_moves_every_trainable_parameter_and_leaves_the_table(trained):
    for name, parameter in trained["trainer"].model.named_parameters():
        moved = not torch.equal(parameter.detach(), trained["start"][name])
        assert moved == (name != "label_embeddings"), name


def test_the_stock_trainer_learns_and_its_metrics_see_nothing_but_logits(trained):
    after = trained["trainer"].evaluate()
    assert after["eval_loss"] < 0.5 * trained["before"]["eval_loss"]
    assert after["eval_accuracy"] > 0.9 > trained["before"]["eval_accuracy"]
    assert all(isinstance(logits, np.ndarray) and logits.shape == (48, 3) for logits in trained["seen"])
    assert trained["trainer"].predict(documents(7, seed=2)).predictions.shape == (7, 3)


def test_the_stock_trainer_saves_checkpoints_that_load(trained):
    checkpoints = [path for path in os.listdir(trained["folder"] / "run") if path.startswith("checkpoint-")]
    assert checkpoints
    loaded = AutoModelForSequenceClassification.from_pretrained(trained["folder"] / "final")
    batch = tiny_batch(num_labels=3)
    expected = trained["trainer"].model.eval()(**batch).logits
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=1e-5)
    assert list(trained["folder"].glob("final/model.safetensors"))


@pytest.mark.parametrize("task", ["text-classification", "sentiment-analysis"])
def test_the_stock_pipeline_gives_the_sigmoid_score_of_each_label(trained, task, caplog):
    folder, text = trained["folder"] / "final", "the data of galaxy market"
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        scores = pipeline(task, model=str(folder), top_k=None, device="cpu")([text])[0]
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    model, tokenizer = trained["trainer"].model.eval(), AutoTokenizer.from_pretrained(folder)
    expected = torch.sigmoid(model(**tokenizer(text, return_tensors="pt")).logits)[0]
    assert {row["label"]: row["score"] for row in scores} == {
        label: pytest.approx(score, abs=1e-6) for label, score in zip(LABELS, expected.tolist())
    }
    assert {row["label"] for row in scores if row["score"] > 0.5} == {"stars", "prices"}


def test_the_stock_pipeline_scores_a_batch_of_texts_like_single_ones(trained):
    classify = pipeline("text-classification", model=str(trained["folder"] / "final"), top_k=None, device="cpu")
    texts = ["the data of star", "image", "the price of the vision of the market of the galaxy of data"]
    for together, text in zip(classify(texts, batch_size=3), texts, strict=True):
        for row, alone in zip(together, classify([text])[0], strict=True):
            assert row["label"] == alone["label"] and row["score"] == pytest.approx(alone["score"], abs=1e-5)


def test_accumulated_gradients_of_the_stock_trainer_equal_those_of_one_large_batch(tmp_path):
    ends = []
    for batch_size, steps in [(8, 1), (2, 4)]:
        model = tiny_model(id2label=dict(enumerate(LABELS)))
        Trainer(
            model=model,
            args=arguments(
                tmp_path / str(steps),
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=steps,
                max_steps=2,
                learning_rate=0.1,
                optim="sgd",
                max_grad_norm=0.0,
                lr_scheduler_type="constant",
                save_strategy="no",
            ),
            train_dataset=documents(16, seed=0),
            data_collator=DataCollatorWithPadding(tiny_tokenizer()),
        ).train()
        ends.append(dict(model.named_parameters()))
    for name, parameter in ends[0].items():
        torch.testing.assert_close(ends[1][name], parameter, atol=1e-4, rtol=1e-3, msg=name)


def test_the_padding_collator_makes_batches_that_the_model_takes():
    data = documents(5, seed=3).remove_columns("text")
    batch = DataCollatorWithPadding(tiny_tokenizer())([data[i] for i in range(5)])
    model = tiny_model(id2label=dict(enumerate(LABELS)))
    out = model(**batch)
    assert out.logits.shape == batch["labels"].shape == (5, 3) and out.loss.isfinite()
    for row in range(5):
        alone = model(input_ids=torch.tensor([data[row]["input_ids"]])).logits[0]
        torch.testing.assert_close(out.logits[row], alone, atol=1e-5, rtol=1e-4)
