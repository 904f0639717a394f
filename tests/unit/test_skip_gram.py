"""Losses of pairs against naive loops in float64, and those that sample against the full softmax in expectation."""

import math

import numpy as np
import pytest
import torch

from embedshard.config.parts import NCEConfig, NegativeSamplingConfig, SampledSoftmaxConfig
from embedshard.data.batch import Batch, Draws, Pairs, Paths
from embedshard.data.huffman import HuffmanTree
from embedshard.models.objectives import products
from embedshard.models.objectives.hierarchical_softmax import (
    HierarchicalSoftmax,
    _LoopedPathLosses,
    _PathLosses,
    path_losses,
)
from embedshard.models.objectives.products import log_sums, pair_logits, softplus_sums
from embedshard.models.objectives.skip_gram import PairNCE, PairNegativeSampling, PairSampledSoftmax, PairSoftmax
from embedshard.models.output import PairOutput
from embedshard.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)
CLASSES, DIM, WINDOW = 9, 4, 3


def vectors(generator, *shape):
    return torch.from_numpy(generator.normal(size=shape).astype(np.float32)).requires_grad_()


def near_pairs(generator, places, window, share=0.6):
    """Some of the pairs of places that are no farther apart than the window, by centre."""
    found = [
        (centre, context)
        for centre in range(places)
        for context in range(max(0, centre - window), min(places, centre + window + 1))
        if centre != context and generator.random() < share
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def make_pairs(places, pairs, window=WINDOW, paths=None, lanes=None, before=None):
    """Pairs of places, whose ids are looked up once; `places` says which of them each holds."""
    centres, contexts = (torch.from_numpy(np.ascontiguousarray(column)) for column in pairs.T)
    return Pairs(
        torch.from_numpy(places),
        centres,
        contexts,
        torch.zeros_like(centres),
        torch.ones(len(pairs)),
        lanes or (0, len(places)),
        window,
        paths,
        before,
    )


def make_batch(draws=None):
    nothing = torch.zeros(1, 0)
    return Batch(None, None, nothing, nothing, torch.ones(1), {}, torch.zeros(1, dtype=torch.int64), draws)


class Case:
    """A few places with ids, a table of class vectors, and contexts drawn from a distribution."""

    def __init__(self, seed=0, places=23, drawn=15, drawn_for="batch", sides=1):
        generator = np.random.default_rng(seed)
        self.ids = generator.integers(0, CLASSES, places)
        self.pairs = near_pairs(generator, places, WINDOW)
        self.lanes = (0, 9, 9, places) if drawn_for == "lane" else (0, places)
        self.pairs = self.pairs[self.lane_of(self.pairs[:, 0]) == self.lane_of(self.pairs[:, 1])]
        self.before = None
        if sides == 2:
            is_after = self.pairs[:, 1] > self.pairs[:, 0]
            self.pairs, self.before = self.pairs[np.argsort(is_after, kind="stable")], int((~is_after).sum())
        self.centre, self.table = vectors(generator, places, DIM), vectors(generator, CLASSES, sides * DIM)
        self.bias = vectors(generator, CLASSES, sides)
        self.q = generator.random(CLASSES) + 0.2
        self.q /= self.q.sum()
        self.draw(generator, drawn)

    def draw(self, generator, drawn):
        self.drawn = generator.choice(CLASSES, drawn, p=self.q)

    def lane_of(self, place):
        return np.searchsorted(self.lanes, place, side="right") - 1

    def met(self, centre):
        """The drawn ids that a place meets."""
        return np.split(self.drawn, len(self.lanes) - 1)[self.lane_of(centre)]

    def output(self, with_bias=False, window=WINDOW):
        distinct, places = np.unique(self.ids, return_inverse=True)
        return PairOutput(
            pairs=make_pairs(places, self.pairs, window, lanes=self.lanes, before=self.before),
            ids_I=torch.from_numpy(distinct),
            centre_VD=self.centre,
            context_VD=self.table[self.ids],
            bias_IS=self.bias[distinct] if with_bias else None,
            candidate_ND=self.table[self.drawn],
            candidate_bias_NS=self.bias[self.drawn] if with_bias else None,
        )

    def of_side(self, pair, centre, table, bias):
        """What a pair is compared with: all there is, or the vectors and biases of its side."""
        number = int(self.before is not None and pair[1] > pair[0])
        return centre, table[:, number * DIM : (number + 1) * DIM], bias[:, number]

    def batch(self):
        log_q = np.log(self.q).astype(np.float32)
        ids, own = torch.from_numpy(self.drawn), log_q[np.unique(self.ids)]
        nothing = torch.zeros(len(ids), 0)
        return make_batch(Draws(ids, torch.from_numpy(log_q[self.drawn]), torch.from_numpy(own), nothing))

    def compare(self, losses, naive):
        """Compares losses and all gradients with a function from (pair, float64 leaves) to a loss."""
        leaves = [leaf for leaf in (self.centre, self.table, self.bias)]
        for leaf in leaves:
            leaf.grad = None
        scale = torch.linspace(0.5, 2.0, len(losses))
        (losses * scale).sum().backward()
        doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
        expected = torch.stack([naive(int(pair[0]), int(pair[1]), *self.of_side(pair, *doubles)) for pair in self.pairs])
        (expected * scale).sum().backward()
        torch.testing.assert_close(losses.detach().double(), expected.detach(), rtol=1e-5, atol=5e-5)
        for leaf, double in zip(leaves, doubles, strict=True):
            if double.grad is not None:
                torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("places", [0, 1, 2, 15, 16, 17, 90])
@pytest.mark.parametrize("window", [1, 5, 20])
def test_logits_of_pairs_are_dot_products(places, window):
    generator = np.random.default_rng(places + window)
    pairs = near_pairs(generator, places, window)
    centre, context = vectors(generator, places, DIM), vectors(generator, places, DIM)
    centres, contexts = torch.from_numpy(pairs[:, 0]), torch.from_numpy(pairs[:, 1])
    found = pair_logits(centre, context, centres, contexts, window)
    slopes = torch.linspace(-1.0, 1.0, len(pairs))
    (found * slopes).sum().backward()
    c, o = (vector.detach().clone().requires_grad_() for vector in (centre, context))
    expected = (c[centres] * o[contexts]).sum(dim=1)
    (expected * slopes).sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(centre.grad, c.grad)
    torch.testing.assert_close(context.grad, o.grad)


@pytest.mark.parametrize("places", [0, 1, 2, 15, 16, 17, 90])
@pytest.mark.parametrize("window", [1, 5, 20])
def test_logits_of_pairs_by_side_are_dot_products_with_their_side(places, window):
    generator = np.random.default_rng(places + window)
    pairs = near_pairs(generator, places, window)
    is_after = pairs[:, 1] > pairs[:, 0]
    pairs = pairs[np.argsort(is_after, kind="stable")]
    before = int((~is_after).sum())
    centre, context = vectors(generator, places, DIM), vectors(generator, places, 2 * DIM)
    centres, contexts = torch.from_numpy(pairs[:, 0]), torch.from_numpy(pairs[:, 1])
    found = pair_logits(centre, context, centres, contexts, window, before)
    slopes = torch.linspace(-1.0, 1.0, len(pairs))
    (found * slopes).sum().backward()
    c, o = (vector.detach().clone().requires_grad_() for vector in (centre, context))
    of_sides = torch.cat([o[:, :DIM][contexts[:before]], o[:, DIM:][contexts[before:]]])
    expected = (c[centres] * of_sides).sum(dim=1)
    (expected * slopes).sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(centre.grad, c.grad)
    torch.testing.assert_close(context.grad, o.grad)


@pytest.mark.parametrize("block", [1, 2**16])
@pytest.mark.parametrize("kept", [0, 2**25], ids=["made again", "kept"])
@pytest.mark.parametrize("candidates", [3, 63, 192, 450])
@pytest.mark.parametrize("kind", ["softplus", "log"])
@pytest.mark.parametrize("groups", [None, (0, 0, 11, 40)], ids=["together", "by groups"])
def test_sums_over_candidates_are_what_they_say(monkeypatch, block, kept, candidates, kind, groups):
    monkeypatch.setattr(products, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(products, "_KEPT_ELEMENTS", kept)
    generator = np.random.default_rng(candidates)
    query, candidate = vectors(generator, 40, DIM), vectors(generator, candidates, DIM)
    offset = vectors(generator, candidates)
    with torch.no_grad():
        query[:3] *= 40.0  # logits of hundreds
    function = softplus_sums if kind == "softplus" else log_sums
    found = function(query, candidate, offset, groups)
    slopes = torch.linspace(-1.0, 1.0, 40)
    (found * slopes).sum().backward()
    q, c, b = (leaf.detach().double().requires_grad_() for leaf in (query, candidate, offset))
    logits = q @ c.T + b
    if groups is not None:
        logits = torch.cat(
            [mine @ c_.T + b_ for mine, c_, b_ in zip(q.split((0, 11, 29)), c.chunk(3), b.chunk(3), strict=True)]
        )
    softplus = torch.nn.functional.softplus(logits, threshold=1e9).sum(1)
    expected = softplus if kind == "softplus" else torch.logsumexp(logits, 1)
    (expected * slopes).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    for leaf, double in ((query, q), (candidate, c), (offset, b)):
        torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-4, atol=1e-4)


def softplus(x):
    return torch.log1p(torch.exp(x))


LANES = pytest.mark.parametrize("drawn_for", ["batch", "lane"])
SIDES = pytest.mark.parametrize("sides", [1, 2], ids=["together", "by side"])


@pytest.mark.parametrize("masked", [True, False])
@LANES
@SIDES
def test_negative_sampling_equals_a_loop_over_pairs_and_candidates(masked, drawn_for, sides):
    case = Case(drawn_for=drawn_for, sides=sides)
    options = {"mask_accidental_hits": masked, "drawn_for": drawn_for}
    config = NegativeSamplingConfig(kind="negative_sampling", negative_weight=5.0, **options)

    def naive(centre, context, c, table, bias):
        own = case.ids[context]
        others = [softplus(c[centre] @ table[id_]) for id_ in case.met(centre) if not (masked and id_ == own)]
        return softplus(-c[centre] @ table[own]) + 5.0 * torch.stack(others).mean()

    case.compare(PairNegativeSampling(config, ALONE)(case.output(), case.batch()), naive)


@LANES
@SIDES
def test_noise_contrastive_estimation_equals_a_loop_over_pairs_and_candidates(drawn_for, sides):
    case = Case(drawn_for=drawn_for, sides=sides)

    def naive(centre, context, c, table, bias):
        def logit(id_):
            return c[centre] @ table[id_] + bias[id_] - math.log(3 * case.q[id_])

        noise = torch.stack([softplus(logit(id_)) for id_ in case.met(centre)]).mean()
        return softplus(-logit(case.ids[context])) + 3 * noise

    config = NCEConfig(kind="nce", negatives_per_pair=3, drawn_for=drawn_for)
    losses = PairNCE(config, ALONE)(case.output(with_bias=True), case.batch())
    case.compare(losses, naive)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("log_q", ["on", "off"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@LANES
@SIDES
def test_sampled_softmax_equals_a_loop_over_pairs_and_candidates(masked, log_q, temperature, drawn_for, sides):
    case = Case(drawn_for=drawn_for, sides=sides)
    options = {"mask_accidental_hits": masked, "drawn_for": drawn_for}
    config = SampledSoftmaxConfig(kind="sampled_softmax", log_q=log_q, temperature=temperature, **options)

    def naive(centre, context, c, table, bias):
        own = case.ids[context]
        score = c[centre] @ table[own] / temperature
        total = torch.exp(score)
        for id_ in case.met(centre):
            if not (masked and id_ == own):
                weight = 1.0 if log_q == "off" else 1.0 / (len(case.met(centre)) * case.q[id_])
                total = total + weight * torch.exp(c[centre] @ table[id_] / temperature)
        return torch.log(total) - score

    case.compare(PairSampledSoftmax(config, ALONE)(case.output(), case.batch()), naive)


def test_a_pair_whose_context_alone_was_drawn_costs_nothing():
    case = Case()
    case.ids[:] = 2
    case.drawn = np.full(6, 2)
    config = SampledSoftmaxConfig(kind="sampled_softmax")
    losses = PairSampledSoftmax(config, ALONE)(case.output(), case.batch())
    losses.sum().backward()
    assert float(losses.detach().abs().max()) < 1e-5
    assert float(case.centre.grad.abs().max()) < 1e-4
    config = NegativeSamplingConfig(kind="negative_sampling")
    losses = PairNegativeSampling(config, ALONE)(case.output(), case.batch())
    own = torch.nn.functional.softplus(-(case.centre @ case.table[2])[case.pairs[:, 0]])
    torch.testing.assert_close(losses, own, rtol=1e-4, atol=1e-4)


def full_softmax(case, fill=0):
    """The softmax over all classes; `fill` places among the candidates stand for none."""
    ids = torch.tensor([*range(CLASSES), *[0] * fill])
    log_q = torch.tensor([0.0] * CLASSES + [math.inf] * fill)
    output = case.output()
    output.candidate_ND = case.table[ids]
    batch = make_batch(Draws(ids, log_q, torch.zeros(len(case.ids)), torch.zeros(len(ids), 0)))
    return PairSoftmax(ALONE)(output, batch)


@pytest.mark.parametrize("fill", [0, 3])
@SIDES
def test_the_softmax_is_over_all_classes(fill, sides):
    case = Case(sides=sides)

    def naive(centre, context, c, table, bias):
        logits = table @ c[centre]
        return torch.logsumexp(logits, 0) - logits[case.ids[context]]

    case.compare(full_softmax(case, fill), naive)


def gradients(case, losses):
    case.centre.grad = case.table.grad = None
    losses.mean().backward()
    return torch.cat([case.centre.grad.flatten(), case.table.grad.flatten()])


def agreement(found, expected):
    return float(torch.nn.functional.cosine_similarity(found, expected, dim=0)), float(
        (found - expected).norm() / expected.norm()
    )


def test_the_gradient_of_a_sampled_softmax_is_the_full_one_in_expectation():
    case, generator = Case(), np.random.default_rng(9)
    expected = gradients(case, full_softmax(case))
    found = {}
    for log_q in ("on", "off"):
        objective = PairSampledSoftmax(SampledSoftmaxConfig(kind="sampled_softmax", log_q=log_q), ALONE)
        total = torch.zeros_like(expected)
        for _ in range(40):
            case.draw(generator, 1024)
            total += gradients(case, objective(case.output(), case.batch())) / 40
        found[log_q] = agreement(total, expected)
    assert found["on"][0] > 0.9999
    assert found["on"][1] < 0.01
    assert found["off"][1] > 0.1, "without the correction it is another one"


@pytest.mark.parametrize("noise", [100, 10_000])
def test_the_gradient_of_nce_nears_the_full_softmax_as_there_is_more_noise(noise):
    """With normalised scores (the bias is less the log of the sum) it is the full one as k grows; at a small k it is not."""
    case, generator = Case(places=2), np.random.default_rng(9)
    case.pairs = np.array([[0, 1]])
    with torch.no_grad():
        case.bias -= case.bias + torch.logsumexp(case.table @ case.centre[0], 0)
    expected = gradients(case, full_softmax(case))
    objective = PairNCE(NCEConfig(kind="nce", negatives_per_pair=noise), ALONE)
    total = torch.zeros_like(expected)
    for _ in range(60):
        case.draw(generator, 4096)
        total += gradients(case, objective(case.output(with_bias=True), case.batch())) / 60
    cosine, difference = agreement(total, expected)
    assert difference < (0.05 if noise == 10_000 else 0.2), (cosine, difference)
    assert cosine > 0.99


# ------------------------------------------------------------------------------------------------- hierarchical softmax
def tree_case(seed=5, places=30):
    generator = np.random.default_rng(seed)
    tree = HuffmanTree(generator.integers(0, 50, CLASSES))
    ids = generator.integers(0, CLASSES, places)
    distinct, place_ids = np.unique(ids, return_inverse=True)
    found = tree.paths(distinct)
    paths = Paths(*map(torch.from_numpy, (found.offsets, found.nodes, found.signs)))
    pairs = near_pairs(generator, places, WINDOW)
    centre, nodes = vectors(generator, places, DIM), vectors(generator, CLASSES - 1, DIM)
    output = PairOutput(
        pairs=make_pairs(place_ids, pairs, paths=paths),
        ids_I=torch.from_numpy(distinct),
        centre_VD=centre,
        node_UD=nodes[torch.from_numpy(found.visited)],
    )
    return tree, ids, pairs, centre, nodes, output


def log_probability(tree, class_, centre, nodes):
    found = tree.paths(np.array([class_]))
    total = torch.zeros((), dtype=centre.dtype)
    for node, sign in zip(found.visited[found.nodes], found.signs, strict=True):
        total = total + torch.nn.functional.logsigmoid(float(sign) * (centre @ nodes[node]))
    return total


def test_probabilities_down_a_tree_sum_to_one():
    tree, _, _, centre, nodes, _ = tree_case()
    for place in range(5):
        probabilities = [
            log_probability(tree, class_, centre[place].double(), nodes.double()).exp() for class_ in range(CLASSES)
        ]
        assert float(sum(probabilities).detach()) == pytest.approx(1.0, abs=1e-12)


def test_hierarchical_softmax_of_all_classes_sums_to_one():
    """The objective itself, asked for each class after the same centre."""
    tree, _, _, centre, nodes, _ = tree_case()
    total = 0.0
    for class_ in range(CLASSES):
        found = tree.paths(np.array([0, class_]))
        paths = Paths(*map(torch.from_numpy, (found.offsets, found.nodes, found.signs)))
        pairs = make_pairs(np.array([0, 1]), np.array([[0, 1]]), window=1, paths=paths)
        output = PairOutput(pairs, torch.tensor([0, class_]), centre[:2], node_UD=nodes[torch.from_numpy(found.visited)])
        total += math.exp(-float(HierarchicalSoftmax()(output, make_batch()).detach()))
    assert total == pytest.approx(1.0, abs=1e-5)


def test_hierarchical_softmax_equals_a_loop_over_pairs_and_nodes():
    tree, ids, pairs, centre, nodes, output = tree_case()
    losses = HierarchicalSoftmax()(output, make_batch())
    scale = torch.linspace(0.5, 2.0, len(losses))
    (losses * scale).sum().backward()
    c, n = centre.detach().double().requires_grad_(), nodes.detach().double().requires_grad_()
    expected = torch.stack([-log_probability(tree, ids[context], c[centre], n) for centre, context in pairs])
    (expected * scale).sum().backward()
    torch.testing.assert_close(losses.detach().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(centre.grad.double(), c.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(nodes.grad.double(), n.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loops_over_ways_equal_blocks_of_them(dtype):
    """A CPU takes the loops, other devices the blocks; what the loops cannot take, the blocks do on a CPU, too."""
    for seed in range(5):
        _, _, _, centre, nodes, output = tree_case(seed, places=60)
        found = {}
        for way in (_LoopedPathLosses, _PathLosses):
            c, n = centre.detach().to(dtype).requires_grad_(), output.node_UD.detach().to(dtype).requires_grad_()
            losses = way.apply(c, n, output.pairs)
            (losses * torch.linspace(0.5, 2.0, len(losses), dtype=dtype)).sum().backward()
            found[way] = losses.detach(), c.grad, n.grad
        for looped, blocked in zip(*found.values(), strict=True):
            torch.testing.assert_close(looped, blocked)
    assert path_losses(centre.bfloat16(), nodes.bfloat16(), output.pairs).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 16, 31, 100, 128, 300])
def test_loops_over_ways_have_the_gradients_of_autograd(dim, dtype):
    """Rows of one piece and of several, whole and not; contexts with one centre and with more than are taken at once."""
    generator = np.random.default_rng(dim)
    for places, window, share in ((1, 3, 1.0), (2, 1, 0.5), (50, 3, 0.2), (50, 20, 0.9)):
        tree = HuffmanTree(generator.integers(0, 1000, 40))
        distinct, ids = np.unique(generator.integers(0, 40, places), return_inverse=True)
        found = tree.paths(distinct)
        paths = Paths(*map(torch.from_numpy, (found.offsets, found.nodes, found.signs)))
        pairs = make_pairs(ids, near_pairs(generator, places, window, share), window, paths)
        centre, nodes = (
            torch.from_numpy(generator.normal(size=(rows, dim))).to(dtype).requires_grad_()
            for rows in (places, len(found.visited))
        )
        way = pairs.ids[pairs.contexts]
        taken = np.concatenate([np.arange(found.offsets[w], found.offsets[w + 1]) for w in way.tolist()] or [[]]).astype(int)
        pair_of = torch.arange(len(way)).repeat_interleave(torch.from_numpy(np.diff(found.offsets))[way])
        products = centre[pairs.centres[pair_of]].double() * nodes[paths.nodes[taken]].double()
        decisions = -torch.nn.functional.logsigmoid(paths.signs[taken] * products.sum(dim=1))
        expected = torch.zeros(len(way), dtype=torch.float64).index_add(0, pair_of, decisions)
        losses = path_losses(centre, nodes, pairs)
        scale = torch.linspace(-0.5, 2.0, len(way), dtype=dtype)
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(losses.double(), expected, **close)
        gradients = (torch.autograd.grad((x * scale).sum(), (centre, nodes)) for x in (losses, expected))
        for got, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(got, wanted, **close)


def test_loss_of_the_longest_way_is_not_lost():
    """Ninety decisions of even chance, and with one that is all but wrong."""
    paths = Paths(torch.tensor([0, 90]), torch.arange(90), torch.ones(90))
    pairs = make_pairs(np.array([0, 0]), np.array([[0, 1]]), window=1, paths=paths)
    centre, nodes = torch.ones(2, 4), torch.zeros(90, 4)
    assert float(path_losses(centre, nodes, pairs)[0]) == pytest.approx(90 * math.log(2), rel=1e-5)
    nodes[7] = -25.0
    assert float(path_losses(centre, nodes, pairs)[0]) == pytest.approx(89 * math.log(2) + 100, rel=1e-5)
