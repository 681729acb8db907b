"""
The client side of test_hub.py, run in separate processes: `HF_ENDPOINT` must be set before huggingface_hub is imported.

    python hub_client.py with_package FOLDER      trains and pushes; writes its results to FOLDER/with_package.json
    python hub_client.py without_package FOLDER   pulls where the package cannot be imported; the same
"""

import json
import sys
import traceback
from pathlib import Path


PACKAGES = ("modeling_sep_mldc", "trainer", "augmentation")
TEXTS = ["a b c", "d e a b", "c"]
LABELS = [
    "plain",
    "comma, semicolon; | pipe",
    "\"double\" and 'single' quotes",
    "new\nline",
    "emoji 👩‍🔬",
    "עברית العربية",
]
DESCRIPTIONS = {"plain": "a b c", "new\nline": "d e " * 25_000}  # one of 100 kB


class Blocker:
    """Hides the installed package."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def outcome(function):
    """What a call raises: the type's name and the message."""
    try:
        function()
    except Exception as error:
        return [type(error).__name__, "".join(traceback.format_exception_only(error))]
    return ["nothing", ""]


def logits_of(model, tokenizer):
    import torch

    inputs = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits.tolist()


def make_tokenizer():
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcde:"]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=64)


def make_model(folder, tokenizer, labels=LABELS, descriptions=DESCRIPTIONS, seed=0, **kwargs):
    import torch
    from transformers import BertConfig, BertModel

    from modeling_sep_mldc import SepMldcForMultiLabelClassification

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    encoder.save_pretrained(folder / "encoder")
    return SepMldcForMultiLabelClassification.from_backbone(
        str(folder / "encoder"), tokenizer, labels, descriptions, **kwargs
    )


def make_trainer(folder, tokenizer, model, name, **kwargs):
    from datasets import Dataset

    from trainer import SepMldcTrainer, SepMldcTrainingArguments

    documents = Dataset.from_list(
        [{**tokenizer(TEXTS[i % 3]), "label_indices": [i % len(LABELS), 0] if i % 3 else [0]} for i in range(8)]
    )
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    settings |= {"logging_steps": 1, "metric_ks": "1", "use_cpu": True, "disable_tqdm": True, "report_to": []}
    settings |= {"hub_token": "hf_alice", "push_to_hub": True, "hub_always_push": True, "learning_rate": 0.01}
    args = SepMldcTrainingArguments(str(folder / name), hub_model_id=f"alice/{name}", **{**settings, **kwargs})
    return SepMldcTrainer(model, args, train_dataset=documents, eval_dataset=documents, processing_class=tokenizer)


def with_package(folder):
    import torch
    from huggingface_hub import HfApi
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    import modeling_sep_mldc  # noqa: F401

    seen = {}
    tokenizer = make_tokenizer()
    model = make_model(folder, tokenizer)
    model.config.label_counts, model.config.num_train_documents = [9, 5, 3, 2, 1, 0], 9

    # Training that pushes as it goes. The first upload of all is cut by the server, the client sends it again.
    trainer = make_trainer(
        folder, tokenizer, model, "run", hub_strategy="checkpoint", save_total_limit=1, report_to=["tensorboard"]
    )
    trainer.model_card_kwargs = {"license": "mit", "language": "en", "datasets": ["alice/documents"]}
    trainer.train()
    seen["wrong token in push"] = outcome(lambda: trainer.push_to_hub(token="hf_wrong"))
    trainer.push_to_hub()
    seen["measured"] = trainer.evaluate()
    seen["logits"] = logits_of(model, tokenizer)
    seen["wrong token in trainer"] = outcome(
        lambda: make_trainer(folder, tokenizer, model, "wrong", hub_token="hf_wrong")
    )

    # A run folder with a README of the user's.
    (folder / "every").mkdir()
    (folder / "every" / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    other = make_model(folder, tokenizer, ["x", "y"], None, seed=1, classifier="similarity", label_attention=False)
    other_trainer = make_trainer(
        folder, tokenizer, other, "every", hub_strategy="every_save", max_steps=3, eval_strategy="no", save_steps=1,
        label_encoding="embedding", train_sampling_strategy="random",
    )  # fmt: skip
    other_trainer.train_dataset = other_trainer.train_dataset.map(
        lambda row: {"label_indices": row["label_indices"][-1:]}
    )
    other_trainer.train_dataset = other_trainer.train_dataset.filter(lambda row: row["label_indices"][0] < 2)
    other_trainer.train()
    seen["other logits"] = logits_of(other, tokenizer)

    # Pull without a flag, by both Auto classes; then on from hand to hand.
    pulled = AutoModelForSequenceClassification.from_pretrained("alice/run")
    seen["pulled"] = type(pulled).__name__, logits_of(pulled, AutoTokenizer.from_pretrained("alice/run"))
    pulled.push_to_hub("alice/second", token="hf_alice")
    tokenizer.push_to_hub("alice/second", token="hf_alice")
    again = AutoModel.from_pretrained("alice/second")
    seen["pulled again"] = type(again).__name__, logits_of(again, tokenizer)

    # Shards, a private repository, a second version on a branch.
    model.push_to_hub("alice/sharded", token="hf_alice", max_shard_size="3KB")
    tokenizer.push_to_hub("alice/sharded", token="hf_alice")
    model.push_to_hub("alice/secret", token="hf_alice", private=True)
    seen["private without token"] = outcome(lambda: AutoModel.from_pretrained("alice/secret", token=False))
    seen["private with token"] = outcome(lambda: AutoModel.from_pretrained("alice/secret", token="hf_alice"))
    seen["missing name"] = outcome(lambda: AutoModel.from_pretrained("alice/no-such-model"))
    HfApi().create_branch("alice/second", branch="next", token="hf_alice")
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    model.push_to_hub("alice/second", token="hf_alice", revision="next")
    seen["revisions"] = {
        revision: logits_of(AutoModel.from_pretrained("alice/second", revision=revision), tokenizer)
        for revision in ("main", "next")
    }

    # The server cuts the commit: nothing is there, and the same call again does it all.
    seen["cut commit"] = outcome(lambda: model.push_to_hub("alice/cut", token="hf_alice"))
    seen["files after cut"] = HfApi(token=False).list_repo_files("alice/cut")
    model.push_to_hub("alice/cut", token="hf_alice")
    return seen


def without_package(folder):
    import importlib.util

    sys.meta_path.insert(0, Blocker())
    seen = {"blocked": [outcome(lambda name=name: importlib.util.find_spec(name))[0] for name in PACKAGES]}
    from huggingface_hub import HfApi
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained("alice/run", token=False)  # no flag, no question
    seen["no flag"] = outcome(lambda: AutoModelForSequenceClassification.from_pretrained("alice/run", token=False))
    trust = {"trust_remote_code": True, "token": False}
    model = AutoModelForSequenceClassification.from_pretrained("alice/run", **trust)
    seen["class"], seen["module"] = type(model).__name__, type(model).__module__
    seen["logits"] = logits_of(model, tokenizer)
    seen["labels"] = [model.config.id2label[index] for index in range(model.config.num_labels)]
    seen["descriptions"] = model.config.label_descriptions
    seen["AutoModel"] = logits_of(AutoModel.from_pretrained("alice/run", **trust), tokenizer)
    seen["sharded"] = logits_of(AutoModel.from_pretrained("alice/sharded", **trust), tokenizer)
    seen["next"] = logits_of(AutoModel.from_pretrained("alice/second", revision="next", **trust), tokenizer)
    seen["other"] = logits_of(
        AutoModelForSequenceClassification.from_pretrained("alice/every", **trust),
        AutoTokenizer.from_pretrained("alice/every", token=False),
    )
    seen["first again"] = logits_of(model, tokenizer)

    # Every commit that the training made, as someone would have found it at that moment.
    seen["commits"] = {}
    for commit in HfApi(token=False).list_repo_commits("alice/run")[:-1]:
        where = {"subfolder": "last-checkpoint"} if commit.title.endswith("checkpoint") else {}
        found = AutoModelForSequenceClassification.from_pretrained(
            "alice/run", revision=commit.commit_id, **trust, **where
        )
        words = AutoTokenizer.from_pretrained("alice/run", revision=commit.commit_id, token=False, **where)
        seen["commits"][commit.title] = logits_of(found, words)

    # From hand to hand without the package: save, push, pull, save, pull.
    model.push_to_hub("alice/third", token="hf_alice")
    third = AutoModelForSequenceClassification.from_pretrained("alice/third", **trust)
    third.save_pretrained(folder / "third")
    seen["auto_map"] = json.loads((folder / "third" / "config.json").read_text())["auto_map"]
    seen["code"] = sorted(path.name for path in (folder / "third").glob("*.py"))
    fourth = AutoModel.from_pretrained(folder / "third", trust_remote_code=True)
    seen["third"], seen["fourth"] = logits_of(third, tokenizer), logits_of(fourth, tokenizer)
    classifier = pipeline("text-classification", model="alice/run", trust_remote_code=True, token=False, top_k=None)
    seen["pipeline"] = classifier(TEXTS)
    seen |= endpoint(HfApi(token=False))
    return seen


def endpoint(api):
    """What an Inference Endpoint does: pulls the repository, loads its handler.py, and sends it requests that came as JSON."""
    import importlib.util

    path = api.snapshot_download("alice/run")
    spec = importlib.util.spec_from_file_location("handler", Path(path, "handler.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(path)

    def ask(request):
        return json.loads(json.dumps(handler(json.loads(json.dumps(request)))))

    top = {"top_k": 2}
    bad = {
        "no `inputs`": {"parameters": top},
        "no parameter `topk`": {"inputs": TEXTS, "parameters": {"topk": 2}},
        "`parameters` is": {"inputs": TEXTS, "parameters": [2]},
        "`inputs` is": {"inputs": 7},
        "must be a text": {"inputs": [7]},
        "1001 documents": {"inputs": ["a"] * 1001},
        "`batch_size` is": {"inputs": "a", "parameters": {"batch_size": 0}},
    }
    answers = {
        "one": ask({"inputs": TEXTS[0], "parameters": top}),
        "dictionary": ask({"inputs": {"text": TEXTS[0]}, "parameters": top}),
        "many": ask({"inputs": TEXTS, "parameters": {**top, "batch_size": 2}}),
        "errors": {words: outcome(lambda request=request: ask(request)) for words, request in bad.items()},
    }
    return {"endpoint": answers, "requirements": Path(path, "requirements.txt").read_text().splitlines()}


if __name__ == "__main__":
    what, target = sys.argv[1], Path(sys.argv[2])
    result = {"with_package": with_package, "without_package": without_package}[what](target)
    (target / f"{what}.json").write_text(json.dumps(result))
