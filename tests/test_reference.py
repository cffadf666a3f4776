"""The reference against itself: hand-computed examples, and the identities between its formulas."""

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

import reference as ref

INF, NAN = math.inf, math.nan
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
F64 = torch.float64

LABELS = torch.arange(24) % 11
DIVERGENCES = {
    "forward_kl": ref.forward_kl,
    "reverse_kl": ref.reverse_kl,
    "jeffreys": ref.jeffreys,
    "jsd_0.3": lambda s, t: ref.jsd(s, t, 0.3),
    "skew_forward_kl_0.1": lambda s, t: ref.skew_forward_kl(s, t, 0.1),
    "skew_reverse_kl_0.1": lambda s, t: ref.skew_reverse_kl(s, t, 0.1),
    "skew_reverse_kl_0.1_detached": lambda s, t: ref.skew_reverse_kl(s, t, 0.1, detach_mixture=True),
    "tvd": ref.tvd,
    "hellinger_sq": ref.hellinger_sq,
    "renyi_0.3": lambda s, t: ref.renyi(s, t, 0.3),
    "renyi_2": lambda s, t: ref.renyi(s, t, 2.0),
    "alpha_beta_0.2_0.7": lambda s, t: ref.alpha_beta(s, t, 0.2, 0.7),
    "todi_1": ref.todi,
    "todi_0": lambda s, t: ref.todi(s, t, 0.0),
    "todi_2.5": lambda s, t: ref.todi(s, t, 2.5),
    "sampled_reverse_kl": lambda s, t: ref.sampled_reverse_kl(s, t, LABELS[: len(s)]),
}
each_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def row(*probabilities: float) -> Tensor:
    """(1, V) logits of one distribution; 0 becomes a banned token."""
    return tensor(*probabilities).log()[None]


def random_pair(n: int = 24, v: int = 11, spread: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z_s, z_t = (spread * torch.randn(2, n, v, dtype=F64, generator=generator)).unbind()
    return z_s, z_t


def many_pairs() -> tuple[Tensor, Tensor]:
    """Near-equal, ordinary, peaked and saturated rows."""
    pairs = [random_pair(spread=spread, seed=i) for i, spread in enumerate((1e-2, 0.5, 2.0, 8.0, 60.0))]
    return torch.cat([s for s, _ in pairs]), torch.cat([t for _, t in pairs])


def gradient(divergence, z_s: Tensor, z_t: Tensor) -> Tensor:
    z_s = z_s.clone().requires_grad_()
    return torch.autograd.grad(divergence(z_s, z_t).sum(), z_s)[0]


def assert_close(got, expected, **tolerance) -> None:
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=F64), torch.as_tensor(expected, dtype=F64), equal_nan=True, **(tolerance or CLOSE)
    )


def mask_of(n: int, *kept: int) -> list[bool]:
    return [i in kept for i in range(n)]


class TestLogits:
    def test_logits_scale_then_softcap_then_divide_by_each_rows_temperature(self):
        hidden, weight, bias = tensor(1, 2)[:, None], tensor(3, -1)[:, None], tensor(0.5, 0)
        assert_close(ref.logits(hidden, weight, bias, scale=2), [[7, -2], [13, -4]])
        capped = ref.logits(hidden, weight, bias, scale=2, softcap=5.0, temperature=tensor(1, 2))
        expected = [[5 * math.tanh(7 / 5), 5 * math.tanh(-2 / 5)], [2.5 * math.tanh(13 / 5), 2.5 * math.tanh(-4 / 5)]]
        assert_close(capped, expected)


class TestStatistics:
    def test_token_stats_of_a_hand_computed_row(self):
        stats = ref.token_stats(row(1 / 2, 1 / 4, 1 / 4) + 3, row(1 / 8, 3 / 8, 1 / 2), labels=torch.tensor([1]))
        ln = math.log
        expected = {
            "lse_s": 3,
            "lse_t": 0,
            "entropy_s": 1.5 * ln(2),
            "entropy_t": ln(8) / 8 + 3 / 8 * ln(8 / 3) + ln(2) / 2,
            "kl_fwd": ln(1 / 4) / 8 + 3 / 8 * ln(3 / 2) + ln(2) / 2,
            "kl_rev": ln(4) / 2 + ln(2 / 3) / 4 + ln(1 / 2) / 4,
            "hellinger_sq": 1 - math.sqrt(1 / 16) - math.sqrt(3 / 32) - math.sqrt(1 / 8),
            "logp_s": ln(1 / 4),
            "logp_t": ln(3 / 8),
        }
        for name, value in expected.items():
            assert_close(stats[name], [value])

    def test_token_stats_measures_only_what_is_asked_for(self):
        z_s, z_t = random_pair()
        alone = ref.token_stats(z_s, labels=LABELS, margins=True, top_k=3)
        assert {k for k, v in alone.items() if v is not None} == {"lse_s", "entropy_s", "margin_s", "logp_s"}
        plain = {"lse_s", "lse_t", "entropy_s", "entropy_t", "kl_fwd", "kl_rev", "hellinger_sq"}
        assert {k for k, v in ref.token_stats(z_s, z_t).items() if v is not None} == plain

    def test_token_stats_keeps_the_dtype_and_ignores_a_shift_of_the_logits(self):
        z_s, z_t = random_pair()
        options = {"labels": LABELS, "margins": True, "top_k": 3}
        stats, moved = ref.token_stats(z_s, z_t, **options), ref.token_stats(z_s + 120, z_t - 1e3, **options)
        for name in stats.keys() - {"lse_s", "lse_t"}:
            assert_close(moved[name], stats[name], rtol=1e-9, atol=1e-10)
        assert_close(moved["lse_s"], stats["lse_s"] + 120)
        assert all(
            v.dtype in (torch.float32, torch.bool, torch.int64) and len(v) == len(z_s)
            for v in ref.token_stats(z_s.float(), z_t.float(), **options).values()
        )

    def test_divergences_of_near_equal_rows_keep_their_digits(self):
        z_s, noise = random_pair(v=1000)
        stats = ref.token_stats(z_s, z_s + 1e-5 * noise)
        p = z_s.softmax(-1)
        variance = (p * noise.square()).sum(-1) - (p * noise).sum(-1).square()
        for name, factor in (("kl_fwd", 1 / 2), ("kl_rev", 1 / 2), ("hellinger_sq", 1 / 8)):
            assert_close(stats[name], 1e-10 * factor * variance, rtol=1e-3, atol=0)

    def test_kl_of_rounded_rows_is_never_negative(self):
        z, noise = (x.float() for x in random_pair(n=24, v=50))
        stats = ref.token_stats(z, z + 1e-6 * noise)
        assert (ref.forward_kl(z, z + 1e-6 * noise) < 0).any()  # what rounding does
        assert (stats["kl_fwd"] >= 0).all()
        assert (stats["kl_rev"] >= 0).all()

    def test_a_token_banned_in_both_models_changes_nothing(self):
        z_s, z_t = random_pair()
        options = {"margins": True, "top_k": 3, "labels": LABELS}
        banned = torch.full((len(z_s), 1), -INF, dtype=F64)
        plain = ref.token_stats(z_s, z_t, **options)
        padded = ref.token_stats(torch.cat([z_s, banned], 1), torch.cat([z_t, banned], 1), **options)
        for name, value in plain.items():
            assert_close(padded[name], value)

    def test_kl_is_infinite_exactly_where_the_second_model_bans_a_token_of_the_first(self):
        z_s, z_t = row(0.5, 0.5, 0), row(0.25, 0.25, 0.5)
        stats = ref.token_stats(z_s, z_t)
        assert_close(stats["kl_fwd"], [INF])
        assert_close(stats["kl_rev"], [math.log(2)])
        assert_close(stats["hellinger_sq"], [1 - math.sqrt(0.5)])

    def test_the_infinity_is_decided_by_the_logits_not_by_underflow(self):
        faint, gone = tensor(0, 0, -1e5)[None], tensor(0, 0, -INF)[None]  # exp(-1e5) underflows
        assert_close(ref.kl(faint, gone), [INF])
        assert_close(ref.kl(gone, faint), [0])
        level = tensor(0, 0, 0)[None]
        assert_close(ref.kl(level, faint), [1e5 / 3 - math.log(1.5)])

    @pytest.mark.parametrize("bad", ["nan", "inf", "all banned", "nan beside a ban"])
    def test_a_broken_row_is_nan_in_what_reads_it_and_nowhere_else(self, bad):
        z_s, z_t = random_pair()
        z_t[0, 3] = -INF  # kl_rev would be infinite: NaN wins
        z_t[0, 1] = 50  # the models would agree where the student has +inf: a broken row does not
        options = {"margins": True, "top_k": 3, "labels": LABELS}
        good = ref.token_stats(z_s, z_t, **options)
        if bad == "all banned":
            z_s[0] = -INF
        else:
            z_s[0, 1] = INF if bad == "inf" else NAN
            if "ban" in bad:
                z_s[0, 2] = -INF
        stats = ref.token_stats(z_s, z_t, **options)
        for name, value in stats.items():
            assert_close(value[1:], good[name][1:])
        teacher_only = {"lse_t", "entropy_t", "margin_t", "logp_t"}
        for name in stats.keys() - {"agree", "rank_t_of_argmax_s"}:
            assert stats[name][0].isnan() == (name not in teacher_only), name
        assert not stats["agree"][0]
        assert stats["rank_t_of_argmax_s"][0] == 3

    def test_margin_is_infinite_with_fewer_than_two_finite_logits(self):
        z = torch.stack([tensor(1, 4, 2), tensor(5, 5, 0), tensor(-INF, 2, -INF), tensor(7, -INF, 6.5)])
        assert_close(ref.token_stats(z, margins=True)["margin_s"], [2, 0, INF, 0.5])

    def test_agreement_and_top_k_give_ties_to_the_lower_id(self):
        z_s = torch.stack([tensor(1, 1, 0, 0), tensor(0, 2, 2, 0), tensor(0, 0, 0, 9), tensor(3, 0, -INF, -INF)])
        z_t = torch.stack(
            [row(0.25, 0.25, 0.25, 0.25), row(0.1, 0.3, 0.4, 0.2), row(0.4, 0.3, 0.2, 0.1), row(0, 0.5, 0.3, 0.2)]
        )[:, 0]
        stats = ref.token_stats(z_s, z_t, margins=True, top_k=2)
        assert stats["agree"].tolist() == [True, False, False, False]
        assert_close(stats["mass_t_on_top_s"], [0.5, 0.7, 0.5, 0.5])  # student's pairs: 01, 12, 30, 01
        assert stats["rank_t_of_argmax_s"].tolist() == [0, 1, 2, 2]
        # A banned token is in no list, however long: the fourth student's argmax, and its own third and fourth.
        stats = ref.token_stats(z_s, z_t, top_k=9)
        assert_close(stats["mass_t_on_top_s"], [1, 1, 1, 0.5])
        assert stats["rank_t_of_argmax_s"].tolist() == [0, 1, 3, 9]

    def test_a_long_list_of_equal_logits_is_in_order_of_ids(self):
        ids, listed = ref.top_ids(torch.zeros(2, 5000), 4000)
        assert torch.equal(ids, torch.arange(4000).expand(2, 4000))
        assert listed.all()

    def test_labels_of_minus_100_have_no_log_probability(self):
        stats = ref.token_stats(row(0.5, 0.5, 0).expand(3, 3), labels=torch.tensor([-100, 1, 2]))
        assert_close(stats["logp_s"], [NAN, math.log(0.5), -INF])

    @pytest.mark.parametrize("shape", [(0, 5), (3, 1), (0, 1)])
    def test_no_rows_and_one_token_are_legal(self, shape):
        z = torch.zeros(shape, dtype=F64)
        labels = torch.zeros(shape[0], dtype=torch.int64)
        stats = ref.token_stats(z, z, labels=labels, margins=True, top_k=2)
        assert all(v.shape == shape[:1] for v in stats.values())
        assert all(v.tolist() == [0.0] * shape[0] for k, v in stats.items() if "kl" in k or "entropy" in k)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


def plain_value(name: str, s: Tensor, t: Tensor) -> Tensor:
    """The definitions once more, in probability space, for rows without zeros."""
    w = 1 / (1 + (s / t) ** float(name.split("_")[1])) if name.startswith("todi") else None
    return {
        "forward_kl": lambda: kl(t, s),
        "reverse_kl": lambda: kl(s, t),
        "jeffreys": lambda: kl(t, s) + kl(s, t),
        "jsd_0.3": lambda: 0.3 * kl(t, 0.3 * t + 0.7 * s) + 0.7 * kl(s, 0.3 * t + 0.7 * s),
        "skew_forward_kl_0.1": lambda: kl(t, 0.1 * t + 0.9 * s),
        "skew_reverse_kl_0.1": lambda: kl(s, 0.9 * t + 0.1 * s),
        "skew_reverse_kl_0.1_detached": lambda: kl(s, 0.9 * t + 0.1 * s),
        "tvd": lambda: torch.maximum(t - s, torch.zeros(())).sum(-1),
        "hellinger_sq": lambda: 1 - (t * s).sqrt().sum(-1),
        "renyi_0.3": lambda: (t**0.3 * s**0.7).sum(-1).log() / -0.7,
        "renyi_2": lambda: (t**2 / s).sum(-1).log(),
        "alpha_beta_0.2_0.7": lambda: -(t**0.2 * s**0.7 - 0.2 / 0.9 * t**0.9 - 0.7 / 0.9 * s**0.9).sum(-1) / 0.14,
        "todi_1": lambda: (w * t * (t / s).log() + (1 - w) * s * (s / t).log()).sum(-1),
        "todi_0": lambda: (kl(t, s) + kl(s, t)) / 2,
        "todi_2.5": lambda: (w * t * (t / s).log() + (1 - w) * s * (s / t).log()).sum(-1),
        "sampled_reverse_kl": lambda: (s / t).log().gather(-1, LABELS[: len(s), None])[:, 0],
    }[name]()


def closed_gradient(name: str, s: Tensor, t: Tensor) -> Tensor:
    """The closed forms of reference/README.md, in probability space."""
    d = (t / s).log()

    def mean(x):  # under the student
        return (s * x).sum(-1, keepdim=True)

    def projected(g):
        return g - s * g.sum(-1, keepdim=True)

    def forward():
        return s - t

    def reverse():
        return s * (-d - mean(-d))

    def jsd(w):
        log_ratio = (s / (w * t + (1 - w) * s)).log()
        return (1 - w) * s * (log_ratio - mean(log_ratio))

    def skew_forward(a):
        rho = (1 - a) * s / (a * t + (1 - a) * s)
        return s * (t * rho).sum(-1, keepdim=True) - t * rho

    def skew_reverse(a, detached):
        m = (1 - a) * t + a * s
        inner = (s / m).log() - (0 if detached else a * s / m)
        return s * (inner - mean(inner))

    def tvd():
        sign = torch.sign(s - t)
        return s * (sign - mean(sign)) / 2

    def hellinger():
        return (s * (s * t).sqrt().sum(-1, keepdim=True) - (s * t).sqrt()) / 2

    def renyi(a):
        blend = t**a * s ** (1 - a)
        return s - blend / blend.sum(-1, keepdim=True)

    def alpha_beta(a, b):
        return projected((s ** (a + b) - t**a * s**b) / a)

    def todi(beta):
        w = torch.sigmoid(beta * d)
        return projected((1 - w) * s * (1 - d) - w * t)

    def sampled():
        y = LABELS[: len(s), None]
        onehot = torch.zeros_like(s).scatter(-1, y, 1.0)
        return -d.gather(-1, y) * (onehot - s)

    return {
        "forward_kl": forward,
        "reverse_kl": reverse,
        "jeffreys": lambda: forward() + reverse(),
        "jsd_0.3": lambda: jsd(0.3),
        "skew_forward_kl_0.1": lambda: skew_forward(0.1),
        "skew_reverse_kl_0.1": lambda: skew_reverse(0.1, False),
        "skew_reverse_kl_0.1_detached": lambda: skew_reverse(0.1, True),
        "tvd": tvd,
        "hellinger_sq": hellinger,
        "renyi_0.3": lambda: renyi(0.3),
        "renyi_2": lambda: renyi(2.0),
        "alpha_beta_0.2_0.7": lambda: alpha_beta(0.2, 0.7),
        "todi_1": lambda: todi(1.0),
        "todi_0": lambda: todi(0.0),
        "todi_2.5": lambda: todi(2.5),
        "sampled_reverse_kl": sampled,
    }[name]()


class TestDivergences:
    @each_divergence
    def test_value_equals_the_definition_in_probability_space(self, name):
        z_s, z_t = random_pair()
        assert_close(DIVERGENCES[name](z_s, z_t), plain_value(name, z_s.softmax(-1), z_t.softmax(-1)))

    @each_divergence
    def test_gradient_equals_the_closed_form(self, name):
        z_s, z_t = random_pair()
        expected = closed_gradient(name, z_s.softmax(-1), z_t.softmax(-1))
        assert_close(gradient(DIVERGENCES[name], z_s, z_t), expected)

    @pytest.mark.parametrize(
        "name", [n for n in DIVERGENCES if not n.startswith(("todi", "sampled")) and "detached" not in n]
    )
    def test_gradient_equals_central_differences(self, name):
        z_s, z_t = random_pair(n=3, v=5)
        assert torch.autograd.gradcheck(lambda z: DIVERGENCES[name](z, z_t), z_s.requires_grad_())

    @each_divergence
    def test_gradient_sums_to_zero_and_vanishes_at_equality(self, name):
        z_s, z_t = many_pairs()
        total = gradient(DIVERGENCES[name], z_s[: len(LABELS)], z_t[: len(LABELS)]).sum(-1)
        assert_close(total, torch.zeros_like(total))
        z_s, _ = random_pair()
        assert_close(DIVERGENCES[name](z_s, z_s), torch.zeros(len(z_s)))
        assert_close(gradient(DIVERGENCES[name], z_s, z_s), torch.zeros_like(z_s))

    @each_divergence
    def test_gradient_is_finite_on_hard_rows_and_value_never_nan(self, name):
        z_s, z_t = random_pair(n=8)
        z_s[0, :2], z_t[0, :2] = -INF, -INF  # banned in both; labels 0 to 7 sit on the diagonal
        z_s[1, 8:] = -INF  # banned in the student
        z_t[2, 8:] = -INF  # banned in the teacher
        z_s[3], z_t[3] = 0, 0
        z_s[3, 3], z_t[3, 4] = 1e4, 1e4  # saturated and disjoint
        z_s[4, 5:], z_t[4, :5] = -INF, -INF  # supports disjoint
        z_s[5], z_t[5] = 300 * z_s[5], 300 * z_t[5]
        z_s[6] = z_t[6]
        z_s[7] = z_t[7] + 1e-9
        value, dz = DIVERGENCES[name](z_s, z_t), gradient(DIVERGENCES[name], z_s, z_t)
        assert dz.isfinite().all()
        assert not value[1:].isnan().any()
        assert (dz[value.isinf()] == 0).all()
        if name != "sampled_reverse_kl":
            assert (value >= -1e-12).all()

    @each_divergence
    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_a_broken_row_is_nan_without_gradient_and_leaves_its_neighbours(self, name, bad):
        z_s, z_t = random_pair(n=4)
        good_value, good_dz = DIVERGENCES[name](z_s, z_t), gradient(DIVERGENCES[name], z_s, z_t)
        z_s[1], z_t[2] = bad, bad
        value, dz = DIVERGENCES[name](z_s, z_t), gradient(DIVERGENCES[name], z_s, z_t)
        assert value.isnan().tolist() == [False, True, True, False]
        assert (dz[1:3] == 0).all()
        assert_close(value[[0, 3]], good_value[[0, 3]])
        assert_close(dz[[0, 3]], good_dz[[0, 3]])

    @each_divergence
    def test_no_rows_and_one_token_are_legal(self, name):
        for shape in ((0, 5), (1, 1)):
            z = torch.zeros(shape, dtype=F64)
            assert_close(DIVERGENCES[name](z, z), torch.zeros(shape[0]))

    def test_only_a_ban_outside_the_shared_support_is_infinite(self):
        s_bans, full = row(0.5, 0.5, 0), row(0.3, 0.3, 0.4)
        infinite_if_student_bans = {"forward_kl", "jeffreys", "renyi_2", "todi_1", "todi_0", "todi_2.5"}
        infinite_if_teacher_bans = {"reverse_kl", "jeffreys", "todi_1", "todi_0", "todi_2.5"}
        for name, divergence in DIVERGENCES.items():
            assert divergence(s_bans, full).isinf().item() == (name in infinite_if_student_bans), name
            assert divergence(full, s_bans).isinf().item() == (name in infinite_if_teacher_bans), name
        assert_close(ref.renyi(row(1, 0), row(0, 1), 0.3), [INF])

    def test_the_teacher_is_a_constant(self):
        z_s, z_t = random_pair()
        z_t.requires_grad_()
        assert not any(divergence(z_s, z_t).requires_grad for divergence in DIVERGENCES.values())


class TestIdentities:
    def test_todi_1_is_jeffreys_and_todi_0_is_half_of_it(self):
        z_s, z_t = many_pairs()
        jeffreys = ref.forward_kl(z_s, z_t) + ref.reverse_kl(z_s, z_t)
        assert_close(ref.jeffreys(z_s, z_t), jeffreys)
        assert_close(ref.todi(z_s, z_t), jeffreys)
        assert_close(ref.todi(z_s, z_t, 0.0), jeffreys / 2)
        assert_close(ref.todi(z_s, z_t, -1.0), torch.zeros_like(jeffreys))

    def test_todi_0_has_half_the_jeffreys_gradient_but_todi_1_has_not_the_whole(self):
        z_s, z_t = random_pair()
        jeffreys = gradient(ref.jeffreys, z_s, z_t)
        assert_close(gradient(DIVERGENCES["todi_0"], z_s, z_t), jeffreys / 2)
        assert (gradient(ref.todi, z_s, z_t) - jeffreys).abs().max() > 1e-2

    def test_todi_1_gradient_is_forward_kl_plus_a_gated_reverse_kl(self):
        z_s, z_t = random_pair()
        s, t = z_s.softmax(-1), z_t.softmax(-1)
        gated = torch.nn.functional.silu((s / t).log())
        expected = (s - t) + s * gated - s * (s * gated).sum(-1, keepdim=True)
        assert_close(gradient(ref.todi, z_s, z_t), expected)

    @pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
    def test_taid_has_the_gradient_of_renyi(self, alpha):
        z_s, z_t = random_pair()

        def taid(student, teacher):  # forward KL to the blend of both, the student's share of the blend a constant
            return ref.forward_kl(student, alpha * teacher + (1 - alpha) * student.detach())

        renyi = gradient(lambda s, t: ref.renyi(s, t, alpha), z_s, z_t)
        assert_close(gradient(taid, z_s, z_t), renyi)

    def test_renyi_has_its_known_limits_and_special_cases(self):
        z_s, z_t = random_pair()
        forward = ref.forward_kl(z_s, z_t)
        assert_close(ref.renyi(z_s, z_t, 1.0), forward)
        for alpha in (1 - 1e-6, 1 + 1e-6):
            assert_close(ref.renyi(z_s, z_t, alpha), forward, rtol=1e-4, atol=0)
        assert_close(ref.renyi(z_s, z_t, 0.5), -2 * torch.log1p(-ref.hellinger_sq(z_s, z_t)))
        # alpha D_(1 - alpha)(s || t) = (1 - alpha) D_alpha(t || s), and at 0 nothing is left of it
        assert_close(0.3 * ref.renyi(z_t, z_s, 0.7), 0.7 * ref.renyi(z_s, z_t, 0.3))
        assert_close(ref.renyi(z_s, z_t, 1e-6) / 1e-6, ref.reverse_kl(z_s, z_t), rtol=1e-4, atol=0)
        ladder = torch.stack([ref.renyi(z_s, z_t, alpha) for alpha in (0.1, 0.5, 0.9, 1.0, 1.5, 3.0)])
        assert (ladder.diff(dim=0) >= 0).all()

    def test_jsd_tends_to_both_kls(self):
        z_s, z_t = random_pair()
        w = 1e-6
        assert_close(ref.jsd(z_s, z_t, w) / w, ref.forward_kl(z_s, z_t), rtol=1e-3, atol=0)
        assert_close(ref.jsd(z_s, z_t, 1 - w) / w, ref.reverse_kl(z_s, z_t), rtol=1e-3, atol=0)
        assert_close(ref.jsd(z_s, z_t, 0.0), ref.forward_kl(z_s, z_t))
        assert_close(ref.jsd(z_s, z_t, 1.0), ref.reverse_kl(z_s, z_t))

    def test_jsd_is_a_weighted_sum_of_the_skew_kls_and_at_a_half_symmetric(self):
        z_s, z_t = many_pairs()
        parts = 0.3 * ref.skew_forward_kl(z_s, z_t, 0.3) + 0.7 * ref.skew_reverse_kl(z_s, z_t, 0.7)
        assert_close(ref.jsd(z_s, z_t, 0.3), parts)
        assert_close(ref.jsd(z_s, z_t), ref.jsd(z_t, z_s))

    def test_skew_kls_without_skew_are_the_kls(self):
        z_s, z_t = random_pair()
        assert_close(ref.skew_forward_kl(z_s, z_t, 0.0), ref.forward_kl(z_s, z_t))
        assert_close(ref.skew_forward_kl(z_s, z_t, 1e-9), ref.forward_kl(z_s, z_t), rtol=1e-4, atol=0)
        assert_close(ref.skew_reverse_kl(z_s, z_t, 0.0), ref.reverse_kl(z_s, z_t))
        assert_close(ref.skew_reverse_kl(z_s, z_t, 1e-9), ref.reverse_kl(z_s, z_t), rtol=1e-4, atol=0)

    def test_alpha_beta_tends_to_both_kls(self):
        z_s, z_t = random_pair()
        assert_close(ref.alpha_beta(z_s, z_t, 1.0, 1e-6), ref.forward_kl(z_s, z_t), rtol=1e-3, atol=1e-6)
        assert_close(ref.alpha_beta(z_s, z_t, 1e-6, 1.0), ref.reverse_kl(z_s, z_t), rtol=1e-3, atol=1e-6)

    def test_alpha_beta_on_the_simplex_line_is_amari(self):
        z_s, z_t = random_pair()
        c = (0.3 * z_t.log_softmax(-1) + 0.7 * z_s.log_softmax(-1)).exp().sum(-1)
        assert_close(ref.alpha_beta(z_s, z_t, 0.3, 0.7), (1 - c) / 0.21)

    def test_hellinger_bounds_jsd_and_tvd(self):
        z_s, z_t = many_pairs()
        h2, jsd, tvd = (f(z_s, z_t) for f in (ref.hellinger_sq, ref.jsd, ref.tvd))
        slack = 1e-12
        assert (math.log(2) * h2 <= jsd + slack).all()
        assert (jsd <= h2 + slack).all()
        assert (h2 <= tvd + slack).all()
        assert (tvd <= (h2 * (2 - h2)).clamp(min=0).sqrt() + slack).all()

    def test_sampled_reverse_kl_is_on_average_reverse_kl_in_value_and_gradient(self):
        z_s, z_t = random_pair(n=6, v=5)
        z_s.requires_grad_()
        chance = z_s.softmax(-1).detach()
        per_token = [ref.sampled_reverse_kl(z_s, z_t, torch.full((6,), y)) for y in range(5)]
        average = sum(chance[:, y] * per_token[y] for y in range(5))
        assert_close(average.detach(), ref.reverse_kl(z_s, z_t).detach())
        assert_close(torch.autograd.grad(average.sum(), z_s)[0], gradient(ref.reverse_kl, z_s.detach(), z_t))

    def test_sampled_reverse_kl_clips_the_log_ratio_and_skips_missing_labels(self):
        z_s, z_t = row(0.9, 0.1).expand(3, 2), row(0.001, 0.999).expand(3, 2)
        labels = torch.tensor([0, 1, -100])
        value = ref.sampled_reverse_kl(z_s, z_t, labels, clip=2.0)
        assert_close(value, [2, -2, NAN])
        dz = gradient(lambda s, t: ref.sampled_reverse_kl(s, t, labels, clip=2.0), z_s, z_t)
        assert_close(dz, [[0.2, -0.2], [1.8, -1.8], [0, 0]])

    def test_the_statistics_and_the_divergences_agree(self):
        z_s, z_t = random_pair()
        stats = ref.token_stats(z_s, z_t)
        assert_close(stats["kl_fwd"], ref.forward_kl(z_s, z_t))
        assert_close(stats["kl_rev"], ref.reverse_kl(z_s, z_t))
        assert_close(stats["hellinger_sq"], ref.hellinger_sq(z_s, z_t))

    @pytest.mark.parametrize(
        ("call", "argument"),
        [
            (lambda z: ref.jsd(z, z, 1.5), "teacher_weight"),
            (lambda z: ref.skew_forward_kl(z, z, 1.0), "a must"),
            (lambda z: ref.renyi(z, z, 0.0), "alpha"),
            (lambda z: ref.alpha_beta(z, z, 0.2, 0.0), "b must"),
        ],
    )
    def test_parameters_out_of_range_are_named(self, call, argument):
        with pytest.raises(ValueError, match=argument):
            call(torch.zeros(1, 2))


def stats_of(**columns) -> dict[str, Tensor]:
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in columns.items()}


class TestQuota:
    @pytest.mark.parametrize(
        ("keep", "m", "min_rows", "expected"),
        [
            (0.5, 5, 1, 2),
            (0.29, 100, 1, 29),  # 0.29 * 100 is 28.999999999999996
            (0.2, 3, 1, 1),
            (0.2, 3, 0, 0),
            (0.2, 3, 2, 2),
            (0.2, 3, 9, 3),
            (1.0, 7, 1, 7),
            (1, 7, 1, 1),
            (12, 7, 1, 7),
            (0.5, 0, 1, 0),
        ],
    )
    def test_quota(self, keep, m, min_rows, expected):
        assert ref.quota(keep, m, min_rows) == expected

    @pytest.mark.parametrize("keep", [0.0, 1.5, -0.1, 0, -3, True, "half", NAN])
    def test_keep_must_be_a_fraction_or_a_budget(self, keep):
        with pytest.raises(ValueError, match="keep"):
            ref.quota(keep, 10)


class TestRules:
    def test_ties_go_to_the_earlier_row_and_infinity_comes_first(self):
        stats = stats_of(kl_rev=[1, 3, INF, 3, 3, INF])
        for budget, kept in ((1, [2]), (2, [2, 5]), (3, [1, 2, 5]), (4, [1, 2, 3, 5])):
            assert ref.select_top_divergence(stats, budget).tolist() == mask_of(6, *kept)

    def test_masked_and_nan_rows_are_neither_kept_nor_counted(self):
        stats = stats_of(entropy_s=[9, NAN, 1, 2, 3, 4])
        row_mask = torch.tensor([False, True, True, True, True, True])
        assert ref.select_top_entropy(stats, 0.5, row_mask=row_mask).tolist() == mask_of(6, 4, 5)
        assert_close(ref.top_scores(stats, "entropy_s", row_mask=row_mask), [NAN, NAN, 1, 2, 3, 4])

    def test_each_rollout_has_its_own_quota_though_its_rows_are_scattered(self):
        stats = stats_of(entropy_s=[9, 1, 8, 2, 7, 3, 6])
        ids = torch.tensor([-5, 70, -5, 70, -5, 70, 2])  # three rollouts: 9 8 7, 1 2 3 and 6
        assert ref.select_top_entropy(stats, 0.34, rollout_ids=ids).tolist() == mask_of(7, 0, 5, 6)
        assert ref.select_top_entropy(stats, 2, rollout_ids=ids).tolist() == mask_of(7, 0, 2, 3, 5, 6)
        assert ref.select_top_entropy(stats, 0.34, rollout_ids=ids, min_rows=0).tolist() == mask_of(7, 0, 5)
        for scope in ("batch", "global"):
            assert ref.select_top_entropy(stats, 0.34, rollout_ids=ids, scope=scope).tolist() == mask_of(7, 0, 2)

    def test_each_rule_ranks_by_its_own_statistic(self):
        stats = stats_of(entropy_s=[1, 0, 0, 0], kl_rev=[0, 1, 0, 0], hellinger_sq=[0, 0, 1, 0], margin_t=[0, 0, 0, 1])
        rules = ref.select_top_entropy, ref.select_top_divergence, ref.select_top_hellinger, ref.select_top_margin
        for i, rule in enumerate(rules):
            assert rule(stats, 1).tolist() == mask_of(4, i)
        with pytest.raises(ValueError, match="kl_fwd"):
            ref.select_top_divergence(stats, 1, by="kl_fwd")

    def test_keep_all_reads_no_statistic(self):
        stats = stats_of(entropy_s=[NAN, 1, 2])
        assert ref.select_all(stats, row_mask=torch.tensor([True, False, True])).tolist() == mask_of(3, 0, 2)

    def test_threshold_is_strict_on_both_sides(self):
        stats = stats_of(entropy_s=[1, 2, 3, 4, 5, NAN])
        assert ref.select_threshold(stats, "entropy_s", above=2, below=5).tolist() == mask_of(6, 2, 3)
        assert ref.select_threshold(stats, "entropy_s", above=("quantile", 0.5)).tolist() == mask_of(6, 3, 4)
        assert ref.select_threshold(stats, "entropy_s").tolist() == mask_of(6, 0, 1, 2, 3, 4)

    def test_quantile_is_linear_between_neighbours_and_knows_infinity(self):
        assert ref.quantile([3, 1, 2, 10], 0.5) == 2.5
        assert ref.quantile([3, 1, 2, 10], 1.0) == 10
        assert ref.quantile([7], 0.3) == 7
        assert ref.quantile([1, INF, INF], 0.25) == INF
        assert ref.quantile([1, INF, INF], 0.75) == INF
        assert ref.quantile([1, 2, INF], 0.5) == 2

    def test_minmax_puts_infinity_at_one_and_a_zero_range_at_zero(self):
        assert ref.minmax([1, 3, INF, 2]) == [0, 1, 1, 0.5]
        assert ref.minmax([5, 5, INF]) == [0, 0, 1]
        assert ref.minmax([INF]) == [1]
        assert ref.minmax([]) == []

    def test_entropy_is_clipped_at_its_98th_percentile(self):
        entropies = [float(i) for i in range(101)]  # the 0.98 quantile is 98
        assert ref.normal_entropy(entropies)[-4:] == [97 / 98, 1, 1, 1]

    def test_rank_share_counts_strictly_lower_rows(self):
        assert [float(x) for x in ref.rank_share([5, 1, 5, 9, 3])] == [0.5, 0, 0.5, 1, 0.25]
        assert [float(x) for x in ref.rank_share([5.0])] == [1]

    def test_soft_or_by_rank(self):
        stats = stats_of(entropy_s=[0.1, 0.9, 0.5, 0.5, 0.2], kl_rev=[INF, 0.1, 0.1, 2, NAN])
        # Four valid rows: h = 0, 1, 1/3, 1/3 and d = 1, 0, 0, 2/3.
        assert_close(ref.soft_or_scores(stats), [1, 1, 1 / 3, 7 / 9, NAN])
        assert ref.select_soft_or(stats, 0.75).tolist() == mask_of(5, 0, 1, 3)
        assert ref.select_soft_or(stats, 1).tolist() == mask_of(5, 0)  # the tie at 1 goes to the earlier row

    def test_soft_or_ranks_that_tie_on_paper_tie(self):
        # (1 - h)(1 - d) is 3 * 4 / 121 in row 3 and 2 * 6 / 121 in row 8, less in rows 0, 4, 10, 11 and more elsewhere.
        entropy = [0, 1, 2, 8, 3, 4, 5, 6, 9, 7, 10, 11]
        divergence = [10, 9, 8, 7, 11, 6, 4, 3, 5, 2, 1, 0]
        stats = stats_of(entropy_s=entropy, kl_rev=divergence)
        assert_close(ref.soft_or_scores(stats)[[3, 8]], [1 - 12 / 121] * 2)
        assert ref.select_soft_or(stats, 5).tolist() == mask_of(12, 0, 3, 4, 10, 11)
        swap = torch.tensor([0, 1, 2, 8, 4, 5, 6, 7, 3, 9, 10, 11])
        swapped = {name: value[swap] for name, value in stats.items()}
        assert ref.select_soft_or(swapped, 5).tolist() == mask_of(12, 0, 3, 4, 10, 11)

    def test_soft_or_by_minmax(self):
        stats = stats_of(entropy_s=[0, 1, 0.5, 0.25], kl_rev=[4, 0, 2, INF])
        # The clip: position 0.98 * 3 = 2.94, so 1 becomes 0.5 + 0.94 * 0.5 = 0.97.
        h, d = [0, 1, 0.5 / 0.97, 0.25 / 0.97], [1, 0, 0.5, 1]
        assert_close(ref.soft_or_scores(stats, "minmax"), [a + b - a * b for a, b in zip(h, d, strict=True)])
        assert ref.select_soft_or(stats, 3, "minmax").tolist() == mask_of(4, 0, 1, 3)

    def test_soft_or_normalises_over_the_batch_and_fills_quotas_by_rollout(self):
        stats = stats_of(entropy_s=[1, 2, 3, 4], kl_rev=[0, 0, 0, 0])
        ids = torch.tensor([0, 0, 1, 1])
        assert_close(ref.soft_or_scores(stats), [0, 1 / 3, 2 / 3, 1])
        assert ref.select_soft_or(stats, 0.5, rollout_ids=ids).tolist() == mask_of(4, 1, 3)
        with pytest.raises(ValueError, match="normalize"):
            ref.soft_or_scores(stats, "softmax")

    def test_overconfident_keeps_the_best_and_with_thresholds_may_leave_its_quota_unfilled(self):
        stats = stats_of(entropy_s=[0.0, 0.1, 0.2, 0.2, 1.0, 1.0], kl_fwd=[0.05, 0.4, 0.5, INF, 5, 6])
        # The 0.98 quantile of the entropies is 1, so h is the entropy itself.
        assert_close(ref.overconfident_scores(stats), [0.05, 0.36, 0.4, INF, 0, 0], rtol=1e-6, atol=0)
        uncertain = stats_of(entropy_s=[0.0, 1.0], kl_fwd=[1, INF])
        assert_close(ref.overconfident_scores(uncertain), [1, INF])
        assert ref.select_overconfident(stats, 0.34).tolist() == mask_of(6, 2, 3)  # 2 of 6
        assert ref.select_overconfident(stats, 1.0).all()
        thresholds = {"entropy_below": 0.3, "divergence_above": 0.1}
        assert ref.select_overconfident(stats, 1.0, **thresholds).tolist() == mask_of(6, 1, 2, 3)
        assert not ref.select_overconfident(stats, 1.0, divergence_above=INF).any()

    def test_a_row_on_a_threshold_is_on_neither_side_of_it(self):
        # In float64, 0.1 in fp32 is above 0.1; a threshold is rounded to the statistic's dtype first.
        stats = stats_of(entropy_s=[0.1, 0.05], kl_fwd=[0.5, 0.1], kl_rev=[0.1, 0.2])
        assert not ref.select_overconfident(stats, 1.0, entropy_below=0.1, divergence_above=0.1).any()
        assert ref.quadrants(stats, entropy=0.1, divergence=0.1).tolist() == [2, 3]

    def test_overconfident_takes_quantile_thresholds(self):
        stats = stats_of(entropy_s=[0, 1, 2, 3, 4], kl_rev=[4, 3, 2, 1, 0])
        cuts = {"entropy_below": ("quantile", 0.5), "divergence_above": ("quantile", 0.75)}
        assert ref.select_overconfident(stats, 1.0, by="kl_rev", **cuts).tolist() == mask_of(5, 0)

    def test_random_rows_are_uniform_over_sets(self):
        stats = stats_of(entropy_s=[NAN, 1, 2, 3, 4])
        row_mask = torch.tensor([True, True, True, False, True])
        generator = torch.Generator().manual_seed(0)
        draws = Counter(
            tuple(ref.select_random(stats, 0.5, generator=generator, row_mask=row_mask).nonzero()[:, 0].tolist())
            for _ in range(600)
        )
        assert set(draws) == set(itertools.combinations((0, 1, 2, 4), 2))
        assert all(abs(count - 100) < 5 * math.sqrt(600 * 1 / 6 * 5 / 6) for count in draws.values())

    def test_every_rule_takes_an_empty_batch(self):
        names = "entropy_s", "kl_fwd", "kl_rev", "hellinger_sq", "margin_t"
        stats = stats_of(**{name: [] for name in names})
        by_minmax = ref.select_soft_or(stats, 0.5, "minmax")
        cuts = ref.select_overconfident(stats, 0.5, entropy_below=("quantile", 0.5))
        others = [
            rule(stats, 0.5)
            for rule in (
                ref.select_top_entropy,
                ref.select_top_margin,
                ref.select_soft_or,
                ref.select_random,
                ref.select_sample_entropy,
            )
        ]
        assert all(mask.shape == (0,) for mask in (by_minmax, cuts, ref.select_all(stats), *others))


class TestSampleEntropy:
    def test_weights_are_powers_of_entropy_and_hellinger(self):
        stats = stats_of(entropy_s=[0, 2, 3, NAN, 1], hellinger_sq=[0.5, 0, 0.25, 0.5, NAN])
        assert_close(ref.sample_entropy_weights(stats), [0, 2, 3, NAN, 1])
        assert_close(ref.sample_entropy_weights(stats, 2.0, 0.5), [0, 0, 4.5, NAN, NAN])
        assert_close(ref.sample_entropy_weights(stats, 0.0), [1, 1, 1, NAN, 1])

    def test_inclusion_probabilities_of_hand_computed_draws(self):
        assert_close(ref.inclusion_probabilities([1, 2, 5], 1), [1 / 8, 2 / 8, 5 / 8])
        first_two = [1 / 8 + 2 / 8 * 1 / 6 + 5 / 8 * 1 / 3, 2 / 8 + 1 / 8 * 2 / 7 + 5 / 8 * 2 / 3]
        assert_close(ref.inclusion_probabilities([1, 2, 5], 2)[:2], first_two)
        assert_close(ref.inclusion_probabilities([1, 1, 1, 1, 1], 3), [0.6] * 5)
        assert_close(ref.inclusion_probabilities([0, 3, 0], 2), [0.5, 1, 0.5])
        assert sum(ref.inclusion_probabilities([0.3, 1, 2, 4], 3)) == pytest.approx(3)

    def test_draws_have_the_enumerated_inclusion_probabilities(self):
        stats = stats_of(entropy_s=[0.5, NAN, 1, 2, 4], hellinger_sq=[1, 1, 0.25, 0.25, 0.25])
        expected = torch.zeros(5, dtype=F64)
        expected[[0, 2, 3, 4]] = tensor(*ref.inclusion_probabilities([0.5, 0.5, 1, 2], 2))
        generator = torch.Generator().manual_seed(0)
        n = 2000
        seen = sum(ref.select_sample_entropy(stats, 0.5, 1.0, 0.5, generator=generator).double() for _ in range(n))
        assert_close(seen[1], 0)
        assert ((seen / n - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt() + 1e-12).all()


class TestQuadrants:
    def test_quadrants_of_a_hand_computed_batch(self):
        stats = stats_of(
            entropy_s=[1, 1, 0.1, 0.1, 0.5, 0.25, NAN, 1, 0.1],
            kl_rev=[1, 0.05, 1, 0.05, 0.125, 0.125, 1, 1, INF],
        )
        row_mask = torch.tensor([True] * 7 + [False, True])
        found = ref.quadrants(stats, row_mask, entropy=0.5, divergence=0.125)
        # Row 4 is on both thresholds: its entropy is not low, its divergence not high.
        assert found.tolist() == [1, 2, 3, 4, 2, 4, 0, 0, 3]
        assert found.dtype == torch.int8

    def test_quadrants_take_quantiles_of_the_valid_rows(self):
        stats = stats_of(entropy_s=[1, 2, 3, 4, 99], kl_rev=[4, 1, 2, 3, 99])
        row_mask = torch.tensor([True] * 4 + [False])
        half = ("quantile", 0.5)
        assert ref.quadrants(stats, row_mask, entropy=half, divergence=half).tolist() == [3, 4, 2, 1, 0]


class TestAdaKD:
    def test_difficulty_is_the_hellinger_distance(self):
        z_s, z_t = random_pair()
        distance = (z_s.softmax(-1).sqrt() - z_t.softmax(-1).sqrt()).norm(dim=-1) / math.sqrt(2)
        assert_close(ref.difficulty(ref.token_stats(z_s, z_t)), distance)

    def test_temperature_needs_no_root_logarithm_or_tanh(self):
        z_s, z_t = random_pair(n=23)
        stats = ref.token_stats(z_s, z_t)
        h = stats["hellinger_sq"]
        m = h.median()
        tau = ref.difficulty_temperature(stats, strength=0.7, base=1.5)
        assert_close(tau, 1.5 * torch.exp(-0.7 * (h - m) / (h + m)))
        assert tau[h == m].item() == pytest.approx(1.5)
        assert (tau >= 1.5 * math.exp(-0.7)).all()
        assert (tau <= 1.5 * math.exp(0.7)).all()

    def test_temperature_of_hand_computed_rows(self):
        # difficulties 0.1, 0.2, 0.4 and 0.4: the lower median of the valid rows is 0.2
        stats = stats_of(hellinger_sq=[0.01, 0.04, 0.16, 0.16, NAN, 1])
        row_mask = torch.tensor([True] * 5 + [False])
        tau = ref.difficulty_temperature(stats, row_mask, strength=0.5)
        assert_close(tau, [math.exp(0.3), 1, math.exp(-0.3), math.exp(-0.3), 1, 1], rtol=1e-6, atol=0)

    def test_temperature_is_defined_where_the_median_is_zero(self):
        c = 0.5
        stats = stats_of(hellinger_sq=[0, 0, 0.3])
        assert_close(ref.difficulty_temperature(stats), [1, 1, math.exp(-c)], rtol=1e-6, atol=0)
        stats = stats_of(hellinger_sq=[0, 0.3, 0.3])
        assert_close(ref.difficulty_temperature(stats), [math.exp(c), 1, 1], rtol=1e-6, atol=0)
        assert_close(ref.difficulty_temperature(stats, torch.zeros(3, dtype=torch.bool), base=2.0), [2, 2, 2])

    def test_temperature_can_take_the_median_of_each_rollout(self):
        stats = stats_of(hellinger_sq=[0.1, 0.4, 0.1, 0.9, 0.1, 0.9])
        ids = torch.tensor([0, 1, 0, 1, 0, 1])
        tau = ref.difficulty_temperature(stats, rollout_ids=ids)
        assert_close(tau[[0, 2, 3, 4, 5]], torch.ones(5))
        assert tau[1] > 1

    def test_adaptive_focus_replays_a_written_trace(self):
        # averages (smoothing 1/2): 8 | 8, 6, 6, 4, 8, 12, 12; the anchor is 8, then moves with the ratio
        losses = [8, 8, 4, 6, 2, 12, 16, 12]
        ratios = ref.adaptive_focus(losses, warmup=1, smoothing=0.5, tolerance=0.1, step=0.5, floor=0.2)
        #  8 warm-up; 8 = anchor; 6 < 7.2 halves, anchor 6; 6 stays; 4 < 5.4 halves, anchor 4; 8 > 4.4 grows by half,
        #  anchor 8; 12 > 8.8 grows, anchor 12; 12 stays
        assert ratios == [1, 1, 0.5, 0.5, 0.25, 0.375, 0.5625, 0.5625]

    def test_adaptive_focus_stays_within_its_floor_and_one(self):
        falling = [2.0**-i for i in range(12)]
        assert ref.adaptive_focus(falling, smoothing=0.0, step=0.5, floor=0.3)[:4] == [1, 0.5, 0.3, 0.3]
        assert ref.adaptive_focus([2.0**i for i in range(12)], smoothing=0.0) == [1.0] * 12
        assert ref.adaptive_focus(falling, warmup=12, smoothing=0.0) == [1.0] * 12
        assert ref.adaptive_focus([]) == []

    def test_adaptive_focus_moves_its_anchor_only_when_the_ratio_moves(self):
        # At the ceiling the rise to 4 moves nothing, so 2 is still within tolerance of the first anchor, 2.
        options = {"smoothing": 0.0, "tolerance": 0.1, "step": 0.5}
        assert ref.adaptive_focus([2, 4, 2, 1], **options) == [1, 1, 1, 0.5]
        # At the floor the fall to 0.1 moves nothing, so a rise to 0.9 is still below the anchor, 1.
        assert ref.adaptive_focus([2, 1, 0.1, 0.9, 1.2], floor=0.5, **options) == [1, 0.5, 0.5, 0.5, 0.75]

    def test_adakd_gradient_holds_the_temperature_constant(self):
        z_s, z_t = random_pair()
        stats = ref.token_stats(z_s, z_t)
        kept = ref.select_top_hellinger(stats, 0.5)
        tau = ref.difficulty_temperature(stats)[:, None]
        s, t = (z_s / tau).softmax(-1), (z_t / tau).softmax(-1)
        log_ratio = (s / t).log()
        expected = tau / 12 * s * (log_ratio - (s * log_ratio).sum(-1, keepdim=True)) * kept[:, None]
        assert_close(gradient(lambda a, b: ref.adakd_loss(a, b, ref.reverse_kl, keep=0.5), z_s, z_t), expected)
        assert not ref.difficulty_temperature(ref.token_stats(z_s.requires_grad_(), z_t)).requires_grad

    def test_adakd_of_nothing_is_a_connected_zero(self):
        z_s, z_t = random_pair(n=3)
        nothing = torch.zeros(3, dtype=torch.bool)
        dz = gradient(lambda a, b: ref.adakd_loss(a, b, ref.reverse_kl, keep=0.5, row_mask=nothing), z_s, z_t)
        assert_close(dz, torch.zeros_like(z_s))
