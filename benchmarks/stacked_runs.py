"""K runs of SEP-MLDC that are trained together with stacked weights, for `recipe_sweep.py`. Uses only PyTorch and NumPy."""

import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from stacked_encoder import LAYERS, WIDTH, Data, affine, embed, pooled, pretrained, run_layer
from stacked_losses import Losses
from stacked_metrics import measure
from stacked_pretraining import Pretraining


# Settings that all runs of a group share.
GROUP = {
    "max_length": 128,
    "batch": 32,
    "epochs": 5.0,
    "freeze": 0,
    "encoder_dropout": 0.0,
    "head_epochs": 0.0,  # of the head alone, on the embeddings of the pretrained encoder, before the rest
    "evaluations": 8,
    "laat": False,  # label-wise attention over the tokens, added to the logits with each run's `laat_weight`
    "label_encoder": False,  # encode the label texts in each step, with gradients, instead of training a table
    "queue": 0,  # earlier documents, detached, that the document loss compares with
    "contrastive_epochs": 0.0,  # the first epochs train the contrastive losses alone
    "adapt_steps": 0,  # of continued pretraining on the texts of documents and labels, before everything else
    "adapt": "mlm",  # or "simcse"
    "folds": 0,  # runs train on all but their fold, and their logits of it are kept
    "test": False,  # test metrics of the weights that were best on validation
    "top": False,  # with `test`: also the five best labels of each test document, for `intervals`
    "export": False,  # their logits, of the first run
}
# Settings of each run.
RUN = {
    "seed": 0,
    "lr": 1e-4,
    "head_lr": 3e-3,
    "warmup": 0.1,
    "decay": 0.01,
    "dropout": 0.2,
    "bce": 1.0,
    "softmax": 1.0,
    "decoupled": 0.0,
    "asymmetric": 0.0,  # weight of the asymmetric loss (Ridnik et al. 2021): exponents 0 and 4, margin 0.05
    "distribution": 0.0,  # weight of the distribution-balanced loss (Wu et al. 2020)
    "mlp": 1.0,
    "similarity": 1.0,
    "attention": 1.0,
    "attention_raw": 1.0,  # factor of e_x . e_y in the attention
    "attention_cosine": 0.0,  # factor of the cosine there
    "attention_learnt": 0.0,
    "beta": 0.0,
    "gamma": 0.0,
    "prototype": 0.0,  # weight of the contrast between documents and label embeddings
    "weighting": "jaccard",
    "positives_jaccard": 0.0,
    "temperature": 0.1,
    "laat_weight": 0.0,
}
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)
DTYPE = os.environ.get("SWEEP_DTYPE")


class Group(Losses, Pretraining):
    """K runs that are trained together."""

    def __init__(self, data: Data, shared: dict, runs: list[dict]):
        unknown = set(shared) - set(GROUP) - {"data", "size", "name"} | {
            key for run in runs for key in set(run) - set(RUN)
        }
        if unknown:
            raise ValueError(f"There is no setting {sorted(unknown)[0]!r}.")
        self.data, self.device = data, data.device
        self.shared = {**GROUP, **shared}
        self.runs = [{**RUN, **run} for run in runs]
        self.size = self.shared["size"]
        self.dtype = getattr(torch, DTYPE or ("bfloat16" if self.device.type == "cuda" else "float32"))
        self.number, self.vectors = len(self.runs), {}
        rows = np.arange(self.size)
        if self.shared["folds"]:
            folds = np.random.default_rng(7).permutation(self.size) % self.shared["folds"]
            self.rows = [rows[folds != index % self.shared["folds"]] for index in range(self.number)]
            shortest = min(map(len, self.rows))
            self.rows = [kept[:shortest] for kept in self.rows]
            self.held_out = [rows[folds == index % self.shared["folds"]] for index in range(self.number)]
        else:
            self.rows = [rows] * self.number
        self.make_weights()

    def vector(self, name) -> torch.Tensor:
        if name not in self.vectors:
            self.vectors[name] = torch.tensor([float(run[name]) for run in self.runs], device=self.device)
        return self.vectors[name]

    def has(self, name) -> bool:
        """Whether any run has a value other than 0, without asking the device."""
        return any(run[name] for run in self.runs)

    # -- weights --

    def make_weights(self) -> None:
        data, number, freeze = self.data, self.number, self.shared["freeze"]
        encoder = {name: value.to(self.device) for name, value in pretrained(data.folder, data.vocabulary).items()}
        self.frozen = {name: value.unsqueeze(0).to(self.dtype) for name, value in encoder.items()}
        labels = data.num_labels
        with torch.no_grad():
            table = self.encode_frozen("label", 64, LAYERS)
            self.label_texts = table
        body, head = {}, {}
        for name, value in encoder.items():
            layer = name.split(".")[0]
            if (int(layer) >= freeze) if layer.isdigit() else freeze == 0:
                body[name] = value.unsqueeze(0).expand(number, *value.shape)
        normal = []
        for run in self.runs:
            generator = torch.Generator().manual_seed(run["seed"])
            draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.02  # noqa: E731, B023
            normal.append(
                {
                    "dense_w": draw(2 * WIDTH, WIDTH),
                    "output_w": draw(WIDTH, labels) * 0.1,
                    "project_w": draw(2 * WIDTH, WIDTH),
                    **({"laat_w": draw(labels, WIDTH)} if self.shared["laat"] else {}),
                }
            )
        for name in normal[0]:
            head[name] = torch.stack([drawn[name] for drawn in normal]).to(self.device)
        zeros = torch.zeros(number, WIDTH, device=self.device)
        head["dense_b"], head["project_b"] = zeros, zeros
        shares = torch.stack([data.labels["train"][rows].mean(0) for rows in self.rows])
        head["bias"] = torch.logit(shares.clamp(1e-6, 1 - 1e-6))
        head["scale"] = torch.full((number, 1), 10.0, device=self.device)
        head["sharpness"] = torch.zeros(number, 1, device=self.device)
        head["table"] = table.unsqueeze(0).expand(number, -1, -1)
        if self.shared["laat"]:
            head["laat_q"] = table.unsqueeze(0).expand(number, -1, -1)
        # One matrix (K, all weights): body first, then head.
        places, at = {}, 0
        for name, value in [*body.items(), *head.items()]:
            if name == next(iter(head)):
                self.head_start = at
            length = math.prod(value.shape[1:])
            places[name] = (at, at + length)
            at += -(-length // 16) * 16
        self.flat = torch.zeros(number, at, device=self.device)
        self.gradient = torch.zeros_like(self.flat)
        self.first, self.second = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.decays = torch.zeros(1, at, device=self.device)
        self.leaves = {}
        for name, value in [*body.items(), *head.items()]:
            start, end = places[name]
            self.flat[:, start:end] = value.reshape(number, -1)
            leaf = self.flat[:, start:end].view(value.shape).detach().requires_grad_()
            leaf.grad = self.gradient[:, start:end].view(value.shape)
            self.leaves[name] = leaf
            if value.dim() > 2 and name not in ("table", "scale", "sharpness"):
                self.decays[:, start:end] = 1.0
        self.is_body = set(body)
        self.label_embeds = self.leaves["table"]
        self.contrastive_only, self.queue = False, []
        self.steps = {"body": 0, "head": 0}

    def weights(self, body=True) -> dict[str, torch.Tensor]:
        return {
            name: leaf.to(self.dtype)
            for name, leaf in self.leaves.items()
            if (body or name not in self.is_body) and name not in ("bias", "scale", "sharpness")
        }

    def with_labels(self, weights, body=True, dropout=0.0) -> dict[str, torch.Tensor]:
        """The weights with the table of label embeddings that the encoder of this moment gives."""
        self.label_embeds = self.leaves["table"]
        if self.shared["label_encoder"] and body:
            places = np.arange(self.data.num_labels)[None]
            self.label_embeds = self.encode(weights, "label", places, dropout)[0]
            weights = {**weights, "table": self.label_embeds.to(self.dtype)}
        return weights

    # -- the frozen part --

    @torch.no_grad()
    def encode_frozen(self, part: str, max_length: int, layers: int):
        """States after the frozen layers (N, T, d), or embeddings (N, d) after all of them; computed once."""
        key = (part, max_length, layers, self.size if part == "train" else None)
        if key in self.data.states:
            return self.data.states[key]
        for old in [old for old in self.data.states if old[1] != max_length and old[0] != "label"]:
            del self.data.states[old]
        tokens = self.data.tokens[part][: self.size if part == "train" else None, :max_length]
        lengths = torch.from_numpy(self.data.lengths[part][: len(tokens)]).clamp(max=max_length).to(self.device)
        whole = layers == LAYERS
        shape = (len(tokens), WIDTH) if whole else (*tokens.shape, WIDTH)
        out = torch.zeros(shape, dtype=torch.float32 if whole else self.dtype, device=self.device)
        order = lengths.argsort()
        for chunk in order.split(128):
            longest = -(-int(lengths[chunk[-1]]) // 16) * 16
            ids = tokens[chunk, :longest]
            mask = (torch.arange(ids.shape[1], device=self.device) < lengths[chunk, None]).unsqueeze(0)
            x = embed(self.frozen, ids.unsqueeze(0))
            for layer in range(layers):
                x = run_layer(self.frozen, layer, x, mask)
            if whole:
                out[chunk] = pooled(x, mask)[0]
            else:
                out[chunk, : ids.shape[1]] = x.view(*ids.shape, WIDTH)
        self.data.states[key] = out
        return out

    # -- forward --

    def encode(self, weights, part: str, places: np.ndarray, dropout: float = 0.0):
        """Documents at `places` (K or 1, B) to embeddings (K, B, d), token states and their mask."""
        data, freeze, limit = self.data, self.shared["freeze"], self.shared["max_length"]
        rows = torch.from_numpy(places).to(self.device)
        if freeze >= LAYERS:
            embeds = self.encode_frozen(part, limit, LAYERS)[rows]
            return embeds.expand(self.number, -1, -1), None, None
        lengths = np.minimum(data.lengths[part], limit)[places]
        longest = min(-(-int(lengths.max()) // 16) * 16, data.tokens[part].shape[1], limit)
        mask = torch.arange(longest, device=self.device) < torch.from_numpy(lengths).to(self.device).unsqueeze(-1)
        if freeze:
            x = self.encode_frozen(part, limit, freeze)[rows, :longest]
            x = x.reshape(x.shape[0], -1, WIDTH).expand(self.number, -1, -1)
        else:
            tokens = data.tokens[part][rows, :longest]
            x = embed(weights, tokens.expand(self.number, -1, -1))
        if dropout:
            x = F.dropout(x, dropout)
        for layer in range(freeze, LAYERS):
            x = run_layer(weights, layer, x, mask, dropout)
        return pooled(x, mask), x, mask

    def drop(self, x, training: bool):
        if not training or not self.has("dropout"):
            return x
        rates = self.vector("dropout").to(x.dtype).view(-1, 1, 1)
        return x * (torch.rand_like(x) >= rates) / (1 - rates)

    def head(self, weights, embeds, states=None, mask=None, training=False):
        """Logits (K, B, L) in float32."""
        leaves, dtype = self.leaves, self.dtype
        table = weights["table"]
        factors = [self.vector(f"attention_{name}").view(-1, 1, 1) for name in ("raw", "cosine")]
        scores = embeds.to(dtype) @ table.transpose(1, 2)
        attention = scores.float() * factors[0]
        if self.has("attention_cosine"):
            norms = embeds.norm(dim=-1, keepdim=True) * table.float().norm(dim=-1).unsqueeze(1)
            attention = attention + factors[1] * scores.float() / norms.clamp_min(1e-6)
        attention = attention * (leaves["sharpness"] * self.vector("attention_learnt").view(-1, 1)).exp().unsqueeze(-1)
        mixed = torch.softmax(attention, dim=-1).to(dtype) @ table
        features = torch.cat([mixed * self.vector("attention").view(-1, 1, 1).to(dtype), embeds.to(dtype)], dim=-1)
        features = self.drop(features, training)
        hidden = F.gelu(affine(features, weights["dense_w"], weights["dense_b"]))
        logits = (self.drop(hidden, training) @ weights["output_w"]).float() * self.vector("mlp").view(-1, 1, 1)
        query = F.normalize(affine(features, weights["project_w"], weights["project_b"]).float(), dim=-1).to(dtype)
        cosines = (query @ table.transpose(1, 2)).float() / table.float().norm(dim=-1).clamp_min(1e-6).unsqueeze(1)
        logits = logits + self.vector("similarity").view(-1, 1, 1) * leaves["scale"].unsqueeze(-1) * cosines
        logits = logits + leaves["bias"].unsqueeze(1)
        if self.shared["laat"] and states is not None:
            logits = logits + self.vector("laat_weight").view(-1, 1, 1) * self.label_wise(weights, states, mask)
        return logits

    def label_wise(self, weights, states, mask):
        """Label-wise attention over the tokens: sum_t softmax_t(h_t . q_l / sqrt(d)) h_t . w_l."""
        runs, (batch, length) = states.shape[0], mask.shape[1:]
        states = states.to(self.dtype)
        scores = (states @ weights["laat_q"].transpose(1, 2)).view(runs, batch, length, -1) / math.sqrt(WIDTH)
        values = (states @ weights["laat_w"].transpose(1, 2)).view(runs, batch, length, -1)
        scores = scores.masked_fill(~mask.unsqueeze(-1), -1e4)
        return (torch.softmax(scores, dim=2) * values).sum(2).float()

    # -- training --

    def order(self, epoch: int, batch: int):
        """(steps, K, B) documents: of each run its own permutation, similar lengths together, lengths in a common order."""
        length = len(self.rows[0])
        steps = max(length // batch, 1)
        batch = min(batch, length)
        common = np.random.default_rng(1000 + epoch).permutation(steps)
        out = np.empty((self.number, steps, batch), np.int64)
        for index, (run, rows) in enumerate(zip(self.runs, self.rows, strict=True)):
            drawn = rows[
                np.random.default_rng(10_000 * (run["seed"] + 1) + epoch).permutation(length)[: steps * batch]
            ]
            lengths = np.minimum(self.data.lengths["train"], self.shared["max_length"])[drawn]
            window = 50 * batch
            pieces = [
                drawn[at : at + window][np.argsort(-lengths[at : at + window], kind="stable")]
                for at in range(0, len(drawn), window)
            ]
            out[index] = np.concatenate(pieces).reshape(steps, batch)[common]
        return out.transpose(1, 0, 2).copy()

    def factor(self, step: int, total: int) -> torch.Tensor:
        warm = [max(round(run["warmup"] * total), 1) for run in self.runs]
        factors = [
            (step + 1) / start if step < start else max((total - step) / max(total - start, 1), 0.0) for start in warm
        ]
        return torch.tensor(factors, device=self.device)

    def update(self, factor, body: bool) -> None:
        norms = torch.linalg.vector_norm(self.gradient, dim=1)
        clip = (1.0 / (norms + 1e-6)).clamp(max=1.0).view(-1, 1)
        decay = self.vector("decay").view(-1, 1)
        for name, columns, rate in (
            ("body", slice(0, self.head_start), "lr"),
            ("head", slice(self.head_start, None), "head_lr"),
        ):
            if (name == "body" and not body) or (name == "body" and not self.head_start):
                continue
            self.steps[name] += 1
            step = self.steps[name]
            rates = (self.vector(rate) * factor).view(-1, 1)
            adam(
                self.flat[:, columns],
                self.gradient[:, columns],
                self.first[:, columns],
                self.second[:, columns],
                self.decays[:, columns],
                rates,
                decay,
                clip,
                torch.tensor(1 - 0.9**step, device=self.device),
                torch.tensor(1 - 0.999**step, device=self.device),
            )
        self.gradient.zero_()

    def train_step(self, places, factor, body=True):
        weights = self.weights(body)
        weights = self.with_labels(weights, body, self.shared["encoder_dropout"])
        rows = torch.from_numpy(places).to(self.device)
        if body:
            embeds, states, mask = self.encode(weights, "train", places, self.shared["encoder_dropout"])
        else:
            embeds, states, mask = self.encode_frozen("train", self.shared["max_length"], LAYERS)[rows], None, None
        logits = self.head(weights, embeds, states, mask, training=True)
        losses = self.losses(logits, self.data.labels["train"][rows], embeds)
        losses.sum().backward()
        self.update(factor, body)
        return losses.detach()

    @torch.no_grad()
    def predict(self, part: str, rows=None, dtype=torch.float32):
        """Logits (K, N, L) of the documents of a part."""
        weights = self.with_labels(self.weights())
        rows = np.arange(len(self.data.lengths[part])) if rows is None else rows
        out = torch.empty(self.number, len(rows), self.data.num_labels, dtype=dtype, device=self.device)
        order = np.argsort(self.data.lengths[part][rows], kind="stable")
        at = 0
        while at < len(order):
            width = 32
            longest = min(
                int(self.data.lengths[part][rows[order[min(at + width, len(order)) - 1]]]), self.shared["max_length"]
            )
            room = 64_000 if self.shared["laat"] else 400_000
            width = max(min(room // (longest * self.number), 256), 8)
            chosen = order[at : at + width]
            embeds, states, mask = self.encode(weights, part, rows[chosen][None])
            out[:, torch.from_numpy(chosen).to(self.device)] = self.head(weights, embeds, states, mask).to(dtype)
            at += width
        return out

    def evaluate(self, epoch, fused: bool) -> list[dict]:
        logits = self.predict("validation")
        targets = self.data.labels["validation"]
        propensities = self.data.propensities(self.rows[0])
        margins = self.data.margins(self.size) if fused and not self.shared["folds"] else None
        points = []
        for scores in logits:
            point = {"epoch": round(epoch, 3), **measure(scores, targets, propensities, self.size)}
            if margins is not None:
                tried = {scale: measure(scores + scale * margins, targets, propensities) for scale in SCALES}
                best = max(tried, key=lambda scale: tried[scale]["ndcg@5"])
                point["fused"] = {"scale": best, **tried[best]}
            points.append(point)
        return points

    def train(self) -> list[dict]:
        """All epochs; returns a record of each run."""
        shared, began = self.shared, time.time()
        batch = shared["batch"]
        if shared["adapt_steps"]:
            self.adapt()
        steps_per_epoch = max(len(self.rows[0]) // batch, 1)
        # The head alone first.
        if shared["head_epochs"]:
            total, step = max(round(shared["head_epochs"] * steps_per_epoch), 1), 0
            for epoch in range(math.ceil(shared["head_epochs"])):
                for rows in self.order(500 + epoch, batch):
                    if step < total:
                        self.train_step(rows, self.factor(step, total), body=False)
                    step += 1
        total = max(round(shared["epochs"] * steps_per_epoch), 1)
        marks = {round(total * (index + 1) / shared["evaluations"]) for index in range(shared["evaluations"])} | {
            total
        }
        marks.discard(0)
        curves = [[] for _ in self.runs]
        if shared["head_epochs"]:
            for curve, point in zip(curves, self.evaluate(0.0, True), strict=True):
                curve.append(point)
        best = [-1.0] * self.number
        self.kept = [None] * self.number
        step = 0
        running = torch.zeros(self.number, device=self.device)
        for epoch in range(math.ceil(shared["epochs"])):
            for rows in self.order(epoch, batch):
                if step >= total:
                    break
                self.contrastive_only = step < shared["contrastive_epochs"] * steps_per_epoch
                running += self.train_step(rows, self.factor(step, total))
                step += 1
                if step in marks:
                    points = self.evaluate(step / steps_per_epoch, True)
                    for index, (curve, point) in enumerate(zip(curves, points, strict=True)):
                        curve.append(point)
                        if point["ndcg@5"] > best[index]:
                            best[index] = point["ndcg@5"]
                            if shared["test"] or shared["export"]:
                                self.kept[index] = self.flat[index].clone()
        seconds = time.time() - began
        records = []
        for run, curve in zip(self.runs, curves, strict=True):
            changed = {key: value for key, value in run.items() if value != RUN[key]}
            known = {key: value for key, value in shared.items() if key not in GROUP or value != GROUP[key]}
            records.append({**known, **changed, "seconds": round(seconds / self.number, 2), "curve": curve})
        return records

    def keep_best(self) -> None:
        for index, kept in enumerate(self.kept):
            if kept is not None:
                self.flat[index] = kept


def adam_eager(flat, gradient, first, second, decays, rates, decay, clip, correction1, correction2):
    gradient = gradient * clip
    first.lerp_(gradient, 0.1)
    second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    change = first / correction1 / ((second / correction2).sqrt() + 1e-8)
    flat.sub_(rates * (change + decay * decays * flat))


adam = adam_eager


def compile_adam(device) -> None:
    """One kernel instead of a dozen passes over the weights, where the compiler works."""
    global adam
    try:
        compiled = torch.compile(adam_eager, dynamic=True)
        shapes = [torch.rand(4, 64, device=device) for _ in range(4)]
        plain = [value.clone() for value in shapes]
        others = [torch.rand(1, 64, device=device), *(torch.rand(4, 1, device=device) for _ in range(3))]
        others += [torch.tensor(0.1, device=device), torch.tensor(0.001, device=device)]
        compiled(*shapes, *others)
        adam_eager(*plain, *others)
        if all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(shapes, plain, strict=True)):
            adam = compiled
            print("compiled optimizer", flush=True)
        else:
            print("the compiled optimizer differs; the plain one is used", flush=True)
    except Exception as error:  # noqa: BLE001
        print(f"no compiled optimizer ({type(error).__name__}: {error})"[:300], flush=True)
