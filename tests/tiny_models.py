"""Tiny random encoders, a tokenizer and models over them, made in code: milliseconds instead of a download."""

import os
import string

import torch
from transformers import AutoModel, BertTokenizer, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification
from modeling_sep_mldc.label_texts_sep_mldc import pad_label_inputs, tokenize_label_texts


KINDS = ("bert", "roberta", "distilbert", "deberta-v2", "modernbert", "electra", "mpnet")
# Encoders of every kind that `AutoModel` offers cheaply: other positions, other padding, decoders, encoder-decoders.
FAMILIES = (
    *KINDS,
    "albert",
    "camembert",
    "deberta",
    "big_bird",
    "longformer",
    "roformer",
    "xlnet",
    "t5",
    "gpt2",
    "qwen2",
    "llama",
)
HIDDEN_SIZE = 32
NUM_LAYERS = 2
MAX_LENGTH = 128

# <pad> is 1 because MPNet has that number in its code.
SPECIAL_TOKENS = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
WORDS = (
    "the of and to in a for on with we that is are this by model models language graph network search ranking image "
    "images vision learning data query proof theorem star stars galaxy cell cells market price robot robots speech code"
).split()


def tiny_tokenizer() -> BertTokenizer:
    """A word-piece tokenizer over some words and all printable ASCII characters: English text has no unknown token."""
    characters = [c for c in string.printable if not c.isspace() and not c.isupper()]
    tokens = dict.fromkeys([*SPECIAL_TOKENS, *WORDS, *characters, *(f"##{c}" for c in characters)])
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=MAX_LENGTH)


def tiny_backbone_config(
    kind: str = "bert", hidden_dropout: float = 0.0, attention_dropout: float = 0.0, **overrides
) -> PreTrainedConfig:
    """Configuration of a 2-layer encoder, 32 wide, whose vocabulary is [`tiny_tokenizer`]'s; without dropout unless asked."""
    tokenizer = tiny_tokenizer()
    values = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": MAX_LENGTH + 2,  # RoBERTa and MPNet count from <pad>'s id + 1.
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 2 * HIDDEN_SIZE,
        # Larger than usual, so that random encoders tell texts apart.
        "initializer_range": 0.2,
        "hidden_dropout_prob": hidden_dropout,
        "attention_probs_dropout_prob": attention_dropout,
    }
    if kind == "distilbert":
        for ours, theirs in {
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        }.items():
            values[theirs] = values.pop(ours)
    elif kind == "modernbert":
        del values["hidden_dropout_prob"], values["attention_probs_dropout_prob"]
        values.update(
            mlp_dropout=hidden_dropout,
            embedding_dropout=hidden_dropout,
            attention_dropout=attention_dropout,
            local_attention=16,
            global_attn_every_n_layers=2,
            cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
        )
    elif kind in ("roberta", "camembert", "longformer"):
        values["type_vocab_size"] = 1  # As published.
        if kind == "longformer":
            values["attention_window"] = 8
    elif kind == "electra":
        values["embedding_size"] = HIDDEN_SIZE // 2
    elif kind == "deberta-v2":
        # As in the published DeBERTa-v3: relative positions, no absolute ones, no token types.
        values.update(
            relative_attention=True,
            position_buckets=16,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type="p2c|c2p",
            position_biased_input=False,
            type_vocab_size=0,
        )
    elif kind == "deberta":
        values.update(relative_attention=True, pos_att_type="p2c|c2p", position_biased_input=False, type_vocab_size=0)
    elif kind in ("albert", "roformer"):
        values["embedding_size"] = HIDDEN_SIZE
    elif kind == "big_bird":
        values["attention_type"] = "original_full"
    elif kind in ("xlnet", "t5", "gpt2", "qwen2", "llama"):
        values = _decoder_values(kind, tokenizer, values)
    return CONFIG_MAPPING[kind](**{**values, **overrides})


def _decoder_values(kind: str, tokenizer: BertTokenizer, values: dict) -> dict:
    """Fields of the configurations that share little with BERT's."""
    common = {name: values[name] for name in ("vocab_size", "pad_token_id")}
    common |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    if kind in ("qwen2", "llama"):
        kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "initializer_range")
        return {
            **common,
            **{name: values[name] for name in kept},
            "num_key_value_heads": 1,
            "max_position_embeddings": MAX_LENGTH,
        }
    if kind == "gpt2":
        sizes = {"n_embd": HIDDEN_SIZE, "n_layer": NUM_LAYERS, "n_head": 2, "n_positions": MAX_LENGTH}
        return {**common, **sizes, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.2}
    if kind == "xlnet":
        sizes = {"d_model": HIDDEN_SIZE, "n_layer": NUM_LAYERS, "n_head": 2, "d_inner": 2 * HIDDEN_SIZE}
        return {**common, **sizes, "dropout": 0.0, "initializer_range": 0.2}
    sizes = {"d_model": HIDDEN_SIZE, "num_layers": NUM_LAYERS, "num_heads": 2, "d_kv": 16, "d_ff": 2 * HIDDEN_SIZE}
    return {**common, **sizes, "dropout_rate": 0.0, "decoder_start_token_id": tokenizer.pad_token_id}


def tiny_backbone(folder, kind: str = "bert", seed: int = 0, **config_kwargs) -> str:
    """Save a random encoder and its tokenizer under `folder`; returns the path, good for `AutoModel` and `from_backbone`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModel.from_config(tiny_backbone_config(kind, **config_kwargs)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return os.fspath(folder)


def tiny_model(
    num_labels: int = 5,
    kind: str = "bert",
    hidden_dropout: float = 0.0,
    attention_dropout: float = 0.0,
    seed: int = 0,
    attn_implementation: str | None = None,
    **config_kwargs,
) -> SepMldcForMultiLabelClassification:
    """
    A random model in eval mode whose stored label embeddings are the encoded label texts; no dropout unless asked.

    `config_kwargs` are fields of [`SepMldcConfig`]. The classifier and its loss are the paper's unless named, without token attention. Labels are called `label 0`, `label 1`, ... unless `id2label` is given.
    """
    config_kwargs.setdefault("id2label", {i: f"label {i}" for i in range(num_labels)})
    paper = {"classifier": "mlp", "classification_loss": "bce", "classifier_dropout": 0.0, "token_attention": False}
    config_kwargs = {**paper, **config_kwargs}
    config_kwargs.setdefault("backbone_config", tiny_backbone_config(kind, hidden_dropout, attention_dropout))
    config = SepMldcConfig(attn_implementation=attn_implementation, **config_kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SepMldcForMultiLabelClassification(config).eval()
    model.set_label_embeddings(model.encode_labels(tokenize_label_texts(tiny_tokenizer(), config.label_texts)))
    if model.token_attention is not None:
        model.token_attention.start_from(model.label_embeddings)
    return model


def tiny_batch(
    num_documents: int = 4, num_labels: int = 5, length: int = 12, seed: int = 0
) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` (documents of different lengths, right-padded) and multi-hot `labels`, all random."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = tiny_tokenizer()
    lengths = [length - (i % 4) * (length // 5) for i in range(num_documents)]
    first = len(SPECIAL_TOKENS)
    input_ids = torch.randint(first, len(tokenizer), (num_documents, length), generator=generator)
    attention_mask = torch.zeros(num_documents, length, dtype=torch.long)
    for row, n in enumerate(lengths):
        attention_mask[row, :n] = 1
        input_ids[row, 0], input_ids[row, n - 1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    input_ids[attention_mask == 0] = tokenizer.pad_token_id
    labels = (torch.rand(num_documents, num_labels, generator=generator) < 0.4).float()
    labels[torch.arange(num_documents), torch.arange(num_documents) % num_labels] = 1.0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def tiny_candidates(model: SepMldcForMultiLabelClassification, indices: list[int]) -> dict[str, torch.Tensor]:
    """The forward arguments that re-encode the labels `indices`, from other texts than those of their stored rows."""
    texts = [f"the graph of {name} in code" for name in model.config.labels]
    inputs = pad_label_inputs(tokenize_label_texts(tiny_tokenizer(), texts), indices)
    candidates = {f"candidate_{name}": value for name, value in inputs.items()}
    return {**candidates, "candidate_indices": torch.tensor(indices)}
