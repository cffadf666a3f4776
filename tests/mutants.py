"""Small wrong edits, each of which the tests named beside it must catch:   python tests/mutants.py [WORD ...] [-j N]

Every mutant is made in a copy of the package of its own and meets only its own tests, which first have to pass on the
package as it is. A survivor is a claim that no test holds. Words choose the mutants whose file, edit or tests hold one.
"""

# ruff: noqa: E501 (an edit is one line)
from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SHARED = ["numpy", "pytest", "torch", "triton.language", "transformers.models.llama.modeling_llama"]  # by all forks
SECONDS = 300  # of one mutant's tests, after which it counts as caught: it hangs


class Mutant(NamedTuple):
    """One edit of a file of the package: `old`, which stands there once, becomes `new`."""

    file: str
    old: str
    new: str
    tests: str  # files in tests/ with what pytest takes after ::, one after the other


def one_of(row: tuple[str, ...], *files: str) -> str:
    """The one of the files in which a row's text stands."""
    (found,) = [file for file in files if row[0] in (ROOT / "tip_kernels" / file).read_text()]
    return found


STATS = "test_stats.py::test_every_statistic_is_no_worse_than_eager_fp32"
TILES = "test_stats.py::test_a_tiny_workspace_gives_the_same_statistics test_stats.py::test_vocabularies_of_any_size"
BANS = "test_stats.py::test_a_divergence_is_infinite_exactly_where_a_banned_token_is_allowed"
BROKEN = "test_stats.py::test_a_broken_row_is_nan_and_its_neighbours_keep_their_bits"
COLD = "test_stats.py::test_banned_tokens_at_a_temperature_near_zero_are_no_nan"
FLAT = "test_stats.py::test_a_flat_model_beside_a_peaked_one_keeps_its_digits"
TIES = "test_stats.py::test_equal_logits_tie_to_the_lower_id"
LABELS = "test_stats.py::test_a_label_of_minus_100_is_nan_and_a_banned_one_minus_infinity"
LOWEST = "test_stats.py::test_the_lowest_number_of_a_wide_dtype_is_a_banned_label_and_no_second_logit"
HEADS = "test_stats.py::test_heads_measure_like_the_logits_they_stand_for"
FAMILY = "test_divergences.py::test_value_and_gradient_are_no_worse_than_eager_fp32"
FINITE = "test_divergences.py::test_values_are_finite_exactly_where_the_mathematics_is"
LEAVES = "test_divergences.py::test_gradients_reach_every_leaf_of_a_head_with_bias_scale_and_softcap"
LEAVES += "_at_a_temperature_per_row"
ROW_TAU = "test_divergences.py::test_a_temperature_per_row"
SAMPLED = "test_divergences.py::test_sampled_reverse_kl_is_the_score_function_form"
CE = "test_divergences.py::test_a_label_loss_mixes_in_at_temperature_one"
CLIP = "test_divergences.py::test_a_clipped_row_keeps_the_limit_and_has_no_gradient"
SELECT = "test_select.py"
PAPERS = "test_select_papers.py"
WEIGHING = "test_weights.py"
GATED = "test_gated.py -k not(triton)"
GATED_TRITON = "test_gated.py::test_a_gate_of_0_leaves_its_divergence_out_even_infinite_or_without_a_label[triton]"
ADAPTIVE = "test_adaptive.py"
ONE = "test_one_sweep.py"
ONE_IS_TWO = "test_one_sweep.py::test_one_sweep_is_two"
TOPK = "test_topk.py"
TOPK_STATS = "test_topk.py::test_every_statistic_is_that_of_the_outcomes"
TOPK_GRAD = "test_topk.py::test_every_gradient_is_that_of_the_outcomes"
KERNEL = "test_kernels.py::test_row_stats_is_no_worse_than_eager_fp32"
KERNEL_ANY = "test_kernels.py::test_row_stats_takes_any_vocabulary"
KERNEL_TOP = "test_kernels.py::test_row_stats_margins_and_agreement_take_ties_in_order"
KERNEL_LANE = "test_kernels.py::test_row_stats_finds_both_of_the_two_largest_in_one_lane"
KERNEL_NAN = "test_kernels.py::test_row_stats_makes_broken_rows_nan_and_leaves_their_neighbours"
KERNEL_RISE = "test_kernels.py::test_row_stats_finds_what_rises_far_above_the_first_columns"
KERNEL_ONE = "test_kernels.py::test_row_stats_of_the_student_alone"
KERNEL_FAMILY = "test_kernels.py::test_family_values_and_gradients_are_those_of_float64"
KERNEL_GRAD = "test_kernels.py::test_gradient_is_that_of_float64_autograd"
KERNEL_SURE = "test_kernels.py::test_gradient_of_a_sure_students_row_sums_to_zero_and_keeps_its_digits"
KERNEL_LABEL = "test_kernels.py::test_gradient_adds_labels_and_a_cross_entropy_at_temperature_one"
KERNEL_CAP = "test_kernels.py::test_gradient_goes_through_scale_softcap_and_row_temperature"
DISTILL = "test_distill.py"
NORMALIZER = "test_distill.py::test_the_normalizer_divides_the_weighted_sum"
BACKWARD = "test_backward.py"
LINEAR = "test_kernels.py::test_linear_stats_is_no_worse_than_eager_fp32"
LINEAR_ANY = "test_kernels.py::test_linear_stats_takes_any_vocabulary"
FUSED = "test_backends.py::test_fused_statistics_of_heads_are_no_worse_than_eager_fp32"
RANKS = "test_parallel.py::test_ranks"
HEAD_OF = "test_hooks_transformers.py::test_losses_and_gradients_through_head_of_are_those_of_the_models_own_logits"
HOOKED = "test_hooks_transformers.py::test_"
MICRO = HOOKED + "micro_batches_add_up_to_the_whole_batch"
EXPERTS = HOOKED + "experts_own_loss_is_added_by_the_models_coefficient"
TRAINED = "test_hooks_trl.py::test_"
SHARDED = "test_parallel.py -k sharded_models_learn"
JUNK_COMPILED = "test_compiled.py::test_what_masked_rows_hold_is_no_matter_in_a_graph_either"
JUNK = "test_topk.py::test_what_masked_rows_hold_is_no_matter_in_any_entry_point"
LIGER = "test_compat.py::test_fused_loss_and_gradients_are_those_of_the_formula"
LIGER_MIX = "test_compat.py::test_soft_and_hard_losses_come_apart_as_ligers"
GKD = "test_compat.py::test_dense_loss_and_gradient_are_gkds"
COMPILED = "test_compiled.py::test_distill_takes_masks_weights_labels_and_temperatures"
PAGE = "test_inspect.py::test_no_page_holds_an_address_or_unescaped_text"
LOOP_GRAD = "test_opd.py::test_the_gradient_is_that_of_the_mean_divergence_of_the_kept_tokens"

ONLINE = [
    # the fold: every sum of a tile
    ("rest = e.sum(1) - 1", "rest = e[:, 1:].sum(1)", STATS),
    ("    if rows.numel():\n        rest[rows] =", "    if False:\n        rest[rows] =", "test_sure_rows.py::test_entropy_and_log_probability_of_sure_rows_keep_their_digits"),
    ("mul_(2.0 * unit))", "mul_(1.9 * unit))", STATS),
    ("w, out=scratch).sum(1).mul_(0.5)", "w, out=scratch).sum(1).mul_(0.51)", STATS),
    ("- drift * drift", "", STATS),
    ("(2 * root_s * root_t)", "(2 * root_s * root_s)", STATS),
    ("(ban_s & ~ban_t).any(1)", "ban_s.any(1)", STATS),
    ("(ban_t & ~ban_s).any(1)", "ban_t.any(1)", STATS),
    ("            w.clamp_(min=FLOOR)", "            pass", COLD),
    ("torch.mul(e[1], gap, out=scratch).sum(1).mul_(0.5)", "torch.mul(e[0], gap, out=scratch).sum(1).mul_(0.5)", STATS),
    ("sum(1).mul_(-0.5)", "sum(1).mul_(0.5)", STATS),
    ("add_(w_s, alpha=0.5 * blend.b)", "add_(w_s, alpha=0.5 * blend.a)", FAMILY),
    ("(ban_t if blend.a else zero)", "zero", FAMILY),
    ("(ban_s if blend.b else zero)", "zero", FAMILY),
    ("total = w.sub_(m).mul_(2.0)", "total = w.mul_(2.0)", FAMILY),
    ("    x.clamp_(min=FLOOR)\n", "", STATS),
    # the merge
    ("k.max(0)", "k[0], k.argmax(0)", TILES),
    ('masses = a[model] * p', 'masses = r[model] * p', TILES),
    ('masses.scatter(0, first, p[f"M_{model}"].gather(0, first)).sum(0)', "masses.sum(0)", TILES),
    ('(p[f"A_{model}"] + d[model] * p[f"L_{model}"])', 'p[f"A_{model}"]', TILES),
    ("(d[model] - d[other])", "(d[other] - d[model])", TILES),
    ('(a[model] * shifted).sum(0)', '(a[other] * shifted).sum(0)', TILES),
    ("w_t * w_s * p", "w_t * w_t * p", TILES),
    ("+ 0.5 * (w_t - w_s).square()", "", TILES),
    ("out[flag] = p[flag].amax(0)", "out[flag] = p[flag][0]", TILES),
    (" * unit).clamp(min=FLOOR)", " * unit)", COLD),
    ("+ name.b * d[\"s\"]", "", "test_losses.py::test_a_tiny_workspace_gives_the_same_gradients " + FAMILY),
    ('out["sum", name] = (torch.exp2(2.0 *', 'out["sum", name] = (torch.exp2(1.0 *', FAMILY),
    # the finish
    ("torch.where(k > FLOOR, log_mass, torch.nan)", "log_mass", BROKEN),
    ('state[f"M_{model}"].log1p()', "total.log()", "test_sure_rows.py::test_entropy_and_log_probability_of_sure_rows_keep_their_digits"),
    ('out[f"lse_{model}"] = k / temperature + logsum', 'out[f"lse_{model}"] = k + logsum',
     "test_stats.py::test_a_temperature_divides_both_models_logits"),
    ("logsum - NATS * state", "logsum + NATS * state", STATS),
    ("torch.log1p(grown / total)", "-torch.log1p(grown / total)", STATS),
    ("torch.where(grown.abs() < 0.5 * total, torch.log1p(grown / total), log_ratio)", "torch.log1p(grown / total)", FLAT),
    ("/ total + log_ratio).clamp_(min=0.0)", "/ total + log_ratio)", "test_stats.py::test_divergences_are_never_negative"),
    ("torch.where(state[f\"ban_{other}\"] > 0, torch.inf, kl)", "kl", BANS),
    ('out[field] = torch.where(torch.isnan(out["lse_s"] + out["lse_t"]), torch.nan, kl)', "out[field] = kl", BROKEN),
    ('torch.where(torch.isnan(out["lse_s"] + out["lse_t"]), torch.nan, hellinger_sq)', "hellinger_sq", BROKEN),
    ('blend.a * out["logsum_t"]', 'blend.b * out["logsum_t"]', FAMILY),
    ("if power < 0 else value", "if power < -9 else value", FINITE),
    ("torch.where(state[blend] > FLOOR, value, -torch.inf)", "value", FINITE),
]  # fmt: skip

ROW_GRAD = [
    ("return exp(lp_s).sub_(exp(lp_t))", "return exp(lp_s).sub_(exp(lp_s))"),
    ('.sub_(rows["kl_rev"])', ""),
    ('mul_(1 - rows["hellinger_sq"])', "mul_(1)"),
    ('.sub_(exp(0.5 * (lp_s + lp_t))).mul_(0.5)', '.sub_(exp(0.5 * (lp_s + lp_t)))'),
    ("(a * lp_t).add_(lp_s, alpha=1 - a)", "(a * lp_t).add_(lp_s, alpha=a)"),
    ("gap = (lp_t - lp_s).mul_(a).sub_(log_blend)", "gap = (lp_t - lp_s).mul_(a)"),
    ("(a * lp_t).add_(lp_s, alpha=b), (a + b) * lp_s", "(a * lp_t).add_(lp_s, alpha=b), a * lp_s"),
    ('return cross.div_(-a).sub_(exp(lp_s)', 'return cross.neg_().sub_(exp(lp_s)'),
    ('return cross.div_(-a).sub_(exp(lp_s).mul_(rows["sum_g"]))', "return cross.div_(-a)"),
    ('"kl_t": log_s_over_mixture(lp_t, lp_s, 1 - self.teacher_weight)', '"kl_t": log_s_over_mixture(lp_t, lp_s, self.teacher_weight)'),
    ('sub_(rows["kl_s"]).mul_(exp(lp_s)).mul_(1 - w)', 'sub_(rows["kl_s"]).mul_(exp(lp_s)).mul_(w)'),
    ('sub_(rows["kl_s"]).mul_(exp(lp_s)).mul_(1 - w)', 'mul_(exp(lp_s)).mul_(1 - w)'),
    ('log_s_over_mixture(lp_t, lp_s, 1 - self.a).mul_(p_t)', 'log_s_over_mixture(lp_t, lp_s, self.a).mul_(p_t)'),
    ('"mean_share": share.mul_(p_t)', '"mean_share": share'),
    ('exp(lp_s).mul_(rows["mean_share"]).sub_(share.mul_(exp(lp_t)))',
     'exp(lp_s).mul_(rows["mean_share"]).sub_(share)'),
    ('share = 0.0 if self.detach_mixture else', 'share = 0.0 if not self.detach_mixture else'),
    ('.mul_(self.a).sub_(rows["mean_share"])', ".mul_(self.a)"),
    ('return g.sub_(share).sub_(rows["value"])', "return g.sub_(share)"),
    ('exp(log_share).mul_(self.a).mul_(p_s)', "exp(log_share).mul_(self.a)"),
    ('(p_s - exp(lp_t)).abs_().mul_(0.5)', '(p_s - exp(lp_t)).abs_()'),
    ('"mean_sign": (lp_s - lp_t).sign_().mul_(p_s)', '"mean_sign": (lp_s - lp_t).sign_()'),
    ('.sign_().sub_(rows["mean_sign"])', ".sign_()"),
    ('{"value": (up - down).mul_(d)', '{"value": (up + down).mul_(d)'),
    ('"sum_g": down.sub(up).sub_(down.mul_(d))}', '"sum_g": down.sub(up)}'),
    ('.sub_(p_s.mul_(rows["sum_g"]))', ""),
    ("z.clamp_(min=FLOOR).sub_(shift)", "z.sub_(shift)"),
    ("g = g if weight == 1.0 else g.mul_(weight)", "g = g"),
    ("total = g if total is None else total.add_(g)", "total = g"),
    ("log_ratio.add_(math.log(weight_t))", "log_ratio.add_(math.log1p(-weight_t))"),
]  # fmt: skip

TRITON_ONLINE = [
    ("tl.fma(h, h, lanes.mass)", "tl.fma(h, e, lanes.mass)", KERNEL),
    ("tl.fma(e, u, lanes.moment)", "tl.fma(h, u, lanes.moment)", KERNEL),
    ("tl.fma(e_t, d, lanes.drift_t)", "tl.fma(e_s, d, lanes.drift_t)", KERNEL),
    ("tl.fma(e_s, d, lanes.drift_s)", "tl.fma(e_t, d, lanes.drift_s)", KERNEL),
    ("tl.fma(g, g, lanes.spread)", "tl.fma(g, h_t, lanes.spread)", KERNEL),
    ("tl.maximum(lanes.far, tl.abs(d))", "lanes.far",
     "test_kernels.py::test_row_stats_takes_the_lowest_number_of_a_dtype_for_a_ban"),
    ("grew = y > top.first", "grew = y >= top.first", KERNEL_LANE),
    ("tl.maximum(top.second, tl.minimum(top.first, y))", "top.second", KERNEL_LANE),
    ("tl.where(column == winner, top.second, top.first)", "top.second", KERNEL_TOP),
    ("(one.mass > 0.0) & (one.mass < float(\"inf\")) & (tl.abs(one.moment) < float(\"inf\"))", "one.mass > 0.0",
     KERNEL + " " + KERNEL_NAN + " " + KERNEL_RISE),
    ("shift = grid_ceil(most)", "shift = most", KERNEL_FAMILY),
    ("tl.where(banned, FLOOR, tl.fma(y, across(unit, AXIS), -across(shift, AXIS)))",
     "tl.fma(y, across(unit, AXIS), -across(shift, AXIS))", KERNEL + " " + KERNEL_ANY),
    ("return One(shift, total(e, AXIS), total(e * u, AXIS)), u, h, e",
     "return One(shift, total(h, AXIS), total(e * u, AXIS)), u, h, e", KERNEL_ANY),
    ("total(e, AXIS), total(e * u, AXIS)), u, h, e", "total(e, AXIS), total(h * u, AXIS)), u, h, e", KERNEL_ANY),
    ("ban_s = tl.max(tl.where(banned_s & (banned_t == 0), 1.0, 0.0), AXIS)",
     "ban_s = tl.max(tl.where(banned_s, 1.0, 0.0), AXIS)", KERNEL),
    ("ban_t = tl.max(tl.where(banned_t & (banned_s == 0), 1.0, 0.0), AXIS)",
     "ban_t = tl.max(tl.where(banned_t, 1.0, 0.0), AXIS)", KERNEL),
    ("return Pair(total(e_t * d, AXIS), total(e_s * d, AXIS), total(g * g, AXIS), ban_s, ban_t)",
     "return Pair(total(e_s * d, AXIS), total(e_s * d, AXIS), total(g * g, AXIS), ban_s, ban_t)", KERNEL_ANY),
    ("a = tl.exp2(2.0 * d)\n", "a = tl.exp2(d)\n", KERNEL),
    ("a * tl.fma(d, one.mass, one.moment)", "a * one.moment", KERNEL),
    ("r_t * r_t * tl.fma(d, t.mass, pair.drift_t)", "r_t * r_t * pair.drift_t", KERNEL),
    ("r_s * r_s * tl.fma(d, s.mass, pair.drift_s)", "r_s * r_s * tl.fma(d, t.mass, pair.drift_s)", KERNEL),
    ("(r_t - r_s) * (r_t * t.mass - r_s * s.mass)", "0.0", KERNEL),
    ("One(shift, a.mass + b.mass, a.moment + b.moment)", "One(shift, a.mass + b.mass, a.moment)", KERNEL_ANY),
    ("p.drift_t + p2.drift_t", "p.drift_t", KERNEL_ANY),
    ("p.drift_s + p2.drift_s", "p.drift_s", KERNEL_ANY),
    ("p.spread + p2.spread", "p.spread", KERNEL_ANY),
    ("tl.maximum(p.ban_s, p2.ban_s)", "p.ban_s", KERNEL),
    ("tl.maximum(p.ban_t, p2.ban_t)", "p.ban_t", KERNEL),
    ("a.first == b.first, tl.minimum(a.column, b.column)", "a.first == b.first, tl.maximum(a.column, b.column)",
     KERNEL_TOP),
    ("tl.maximum(tl.minimum(a.first, b.first), tl.maximum(a.second, b.second))", "tl.minimum(a.first, b.first)",
     KERNEL_TOP),
    ("return shift, tl.fma(k, C, -shift) + k * C_TAIL", "return shift, k * 0.0", KERNEL_FAMILY),
    ("(one.shift > FLOOR) & (one.mass > 0.0)", "one.shift > FLOOR", KERNEL_NAN),
    ("log_mass - C * (one.moment / mass)", "log_mass + C * (one.moment / mass)", KERNEL),
    ("log1p((mass_s - mass_t) / mass_t)", "log1p((mass_t - mass_s) / mass_t)", KERNEL),
    ("log1p((mass_t - mass_s) / mass_s)", "0.0", KERNEL),
    ("(pair.spread - root * root)", "pair.spread", KERNEL_ANY),
    ("tl.where(pair.ban_s > 0.0, float(\"inf\"), kl_fwd)", "kl_fwd", KERNEL),
    ("tl.where(pair.ban_t > 0.0, float(\"inf\"), kl_rev)", "kl_rev", KERNEL),
    ("return tl.where(ok, kl_fwd, nan), tl.where(ok, kl_rev, nan)", "return kl_fwd, kl_rev", KERNEL_NAN),
    ("tl.where(w < 0.3, near,", "tl.where(w < 0.0, near,",
     "test_kernels.py::test_row_stats_of_a_softcap_far_above_the_logits_keeps_their_digits"),
    ("return tl.where(v < 0.0, -w, w)", "return w",
     "test_kernels.py::test_row_stats_applies_scale_softcap_and_temperature"),
    ("tl.div_rn(outer * HALF_LOG2E, temperature)", "outer * HALF_LOG2E",
     "test_kernels.py::test_row_stats_applies_scale_softcap_and_temperature"),
]  # fmt: skip

TRITON_FAMILY = [
    ("tl.fma(w, p_s - p_t, g)", "tl.fma(w, p_t - p_s, g)", KERNEL_GRAD + "[forward_kl-ordinary]"),
    ("tl.fma(l_s - l_t, w * LN2, -w * kl_rev)", "tl.fma(l_s - l_t, w, -w * kl_rev)",
     KERNEL_GRAD + "[reverse_kl-ordinary]"),
    ("tl.fma(p_s, 1.0 - h2, -tl.exp2(0.5 * (l_s + l_t)))", "tl.fma(p_s, 1.0, -tl.exp2(0.5 * (l_s + l_t)))",
     KERNEL_FAMILY + "[hellinger_sq-ordinary]"),
    ("bits = log_blend * LOG2E", "bits = 0.0 * log_blend", KERNEL_FAMILY + "[renyi(2)-ordinary]"),
    ("alpha_beta_cross(l_s, l_t, a, b) / a), g)", "alpha_beta_cross(l_s, l_t, a, b)), g)",
     KERNEL_FAMILY + "[alpha_beta-ordinary]"),
    ("w * (1.0 - weight_t) * LN2, -w * (1.0 - weight_t) * kl_s)", "w * (1.0 - weight_t) * LN2, 0.0 * kl_s)",
     KERNEL_FAMILY + "[jsd-ordinary]"),
    ("return LN2 * p_s * ratio_s, LN2 * p_t * ratio_t", "return LN2 * p_s * ratio_s, LN2 * p_s * ratio_t",
     KERNEL_FAMILY + "[jsd-ordinary]"),
    ("p_s * mean_share - p_t * share", "p_s * mean_share - p_s * share", KERNEL_FAMILY + "[skew_forward_kl-ordinary]"),
    ("return LN2 * p_t * ratio_t, p_t * (1.0 - a) * tl.exp2(ratio_s)", "return LN2 * p_t * ratio_t, p_s * (1.0 - a) * tl.exp2(ratio_s)",
     KERNEL_FAMILY + "[skew_forward_kl-ordinary]"),
    ("(1.0 - detached) * (a * tl.exp2(ratio) - mean_share)", "a * tl.exp2(ratio) - mean_share",
     KERNEL_FAMILY + " -k detached"),
    ("LN2 * ratio - share - value", "LN2 * ratio - share", KERNEL_FAMILY + "[skew_reverse_kl-ordinary]"),
    ("return LN2 * p_s * ratio, a * p_s * tl.exp2(ratio)", "return LN2 * p_s * ratio, p_s * tl.exp2(ratio)",
     KERNEL_FAMILY + "[skew_reverse_kl-ordinary]"),
    ("sign(at_least_never(l_s) - at_least_never(l_t)) - mean_sign", "sign(at_least_never(l_s) - at_least_never(l_t))", KERNEL_FAMILY + "[tvd-ordinary]"),
    ("return 0.5 * tl.abs(p_s - p_t), ", "return tl.abs(p_s - p_t), ",
     KERNEL_FAMILY + "[tvd-ordinary]"),
    ("down - up - down * d - p_s * sum_g", "down - up - p_s * sum_g", KERNEL_FAMILY + "[todi-ordinary]"),
    ("return (up - down) * d, down - up - down * d", "return (up - down) * d, down - up",
     KERNEL_FAMILY + "[todi-ordinary]"),
    ("w *= numbers[P]", "w *= 1.0", "test_backends.py -k ForwardKL"),
    ("-tl.maximum(a, b + d) - rest", "-tl.maximum(a, b) - rest", KERNEL_FAMILY + "[jsd-ordinary]"),
    ("return LN2 * d, sigmoid2(beta * d) * p_t", "return LN2 * d, sigmoid2(d) * p_t",
     KERNEL_FAMILY + "[todi-ordinary]"),
]  # fmt: skip

TRITON_ROWS = [
    ("row_grad.py", "l_t = tl.where(l_s > NEVER, l_t, NEVER)  # ", "pass  # ",
     "test_kernels.py::test_gradient_at_a_token_that_the_student_bans_is_zero_where_the_divergence_is_infinite_too"),
    ("row_grad.py", "g += tl.where(at == label[0], label[1], 0.0)", "g += 0.0", KERNEL_LABEL),
    ("row_grad.py", "g = tl.fma(label[2], tl.exp2(l_1)", "g = tl.fma(-label[2], tl.exp2(l_1)", KERNEL_LABEL),
    ("row_grad.py", "out_ptr + row * stride_out + column, -others", "out_ptr + row * stride_out + column, others", KERNEL_SURE),
    ("row_grad.py", "g = tl.where(sure | (at >= end), 0.0, g)", "g = tl.where(at >= end, 0.0, g)", KERNEL_SURE),
    ("row_grad.py", "    if column >= 0:\n", "    if column > 5:\n", KERNEL_SURE),
    ("row_grad.py", "g *= 1.0 - y_s * y_s", "g *= 1.0", KERNEL_CAP),
    ("row_grad.py", "((upstream != 0.0) | some) & finite & (row >= 0)", "((upstream != 0.0) | some) & (row >= 0)",
     "test_kernels.py::test_gradient_of_an_infinite_or_broken_row_is_zero"),
    ("row_grad.py", "((upstream != 0.0) | some) & finite & (row >= 0)", "finite & (row >= 0)",
     "test_kernels.py::test_gradient_of_weight_zero_is_zero_whatever_the_logits_hold"),
    ("row_grad.py", "end = tl.where(row >= 0, end, begin)", "end = end",
     "test_kernels.py::test_gradient_leaves_empty_slots_alone"),
    ("row_grad.py", "w = upstream * tl.div_rn(slope, temperature)", "w = upstream * slope", KERNEL_CAP),
    ("row_grad.py", "slope *= inner_s", "slope *= 1.0", KERNEL_CAP),
    ("row_grad.py", "slot = (pid // n_chunks).to(tl.int64)\n    row = slot\n", "slot = pid // n_chunks\n    row = slot\n",
     "test_kernels.py::test_rows_past_two_to_the_31_elements_are_read_and_written"),
    ("row_stats.py", "row = (pid // n_parts).to(tl.int64)", "row = pid // n_parts",
     "test_kernels.py::test_rows_past_two_to_the_31_elements_are_read_and_written "
     "test_contracts.py::test_rows_past_two_to_the_31_elements_measure_and_learn_as_near_ones"),
    ("row_sums.py", "slot = (pid // n_parts).to(tl.int64)", "slot = pid // n_parts",
     "test_kernels.py::test_rows_past_two_to_the_31_elements_are_read_and_written"),
    ("row_stats.py", "tl.where(top.second > FLOOR, margin, float(\"inf\"))", "margin", KERNEL_TOP),
    ("row_stats.py", "return tl.where(inside, y, float(\"-inf\"))", "return y", KERNEL_ANY),
    ("row_stats.py", "tries = tl.where(high, tries - 1, 0)", "tries = 0", KERNEL_RISE),
    ("row_sums.py", "for _ in range(1, n_parts):", "for _ in range(2, n_parts):",
     "test_kernels.py::test_row_sums_and_gradients_take_any_vocabulary[152064]"),
    ("row_sums.py", "l_s = tl.where(inside, l_s, NEVER)", "l_s = l_s",
     "test_kernels.py::test_row_sums_and_gradients_take_any_vocabulary[3]"),
    ("row_sums.py", 'tl.where(row >= 0, total(sums[i]), float("nan"))', "total(sums[i])",
     "test_kernels.py::test_row_sums_ignore_other_rows_and_make_broken_ones_nan "
     "test_kernels.py::test_everything_masked_leaves_nothing"),
]  # fmt: skip

LINEAR_STATS = [
    ("model.weight.load([column, k]).T, acc, input", "model.weight.load([column, k]).T, input", LINEAR),
    ("banned = (at >= n_cols)[None, :]", "banned = (at >= n_cols + 7)[None, :]", LINEAR_ANY),
    ("acc + tl.load(bias_ptr + at, mask=at < n_cols, other=0.0).to(tl.float32)[None, :]", "acc", LINEAR),
    ("return y, banned | (y <= FLOOR)", "return y, tl.broadcast_to(banned, acc.shape)", LINEAR),
    ("row = (tl.program_id(0) % blocks) * ROWS", "row = (tl.program_id(0) % blocks) * 0", LINEAR),
    ("tl.load(temperature_ptr + rows, ", "tl.load(temperature_ptr + rows * 0, ", FUSED),
    ("right_s, right_t, at + COLS // 2", "right_s, right_t, at", LINEAR),
    ("begin = part * PART", "begin = 0 * part", LINEAR_ANY),
    ("part.to(tl.int64) * n_rows + rows", "part.to(tl.int64) * 0 + rows", LINEAR_ANY),
]  # fmt: skip

ACROSS_RANKS = [
    ("bounds.append(min(bounds[-1] + count, vocab))", "bounds.append(bounds[-1] + count)"),
    ("first = sum(counts[: dist.get_rank(group)])", "first = 0"),
    ("part[:count] for part, count", "part for part, count"),
    ("else all_reduce_sum_(x.double(), group).to(x.dtype)", "else x"),
    ("for row in gathered():", "for row in gathered()[:1]:"),
    ("dist.broadcast(x, group=group, group_src=0)", "pass"),
]

BORDERS = [
    ("compat/_calls.py", "mask = (labels != ignored)", "mask = (labels == labels)", LIGER),
    ("compat/liger.py", "loss = total * mean(", "loss = mean(", LIGER_MIX),
    ("compat/liger.py", "labels = true_labels.masked_fill(true_labels == self.ignore_index, IGNORED)", "labels = true_labels", LIGER_MIX),
    ("compat/trl.py", "max(count * student_logits.shape[-1], 1)", "max(count, 1)", GKD),
    ("compat/trl.py", "count if labels is not None else student_logits.shape[0]", "count", GKD),
    ("compat/_calls.py", "return mask, int(mask.sum())", "return mask, mask.numel()", LIGER),
    ("distillation/importance.py", '"kl_div": lambda stats: stats.kl_fwd', '"kl_div": lambda stats: stats.kl_rev', "test_importance.py"),
    ("distillation/importance.py", "torch.where(scores.isneginf(), torch.nan, scores)", "scores", "test_importance.py"),
    ("distillation/importance.py", "scores = torch.where(mask, scores, torch.nan)", "pass", "test_importance.py"),
    ("learn/divergences.py", 'sums = ("value", "mean_sign")', 'sums = ("mean_sign", "value")', "test_compiled.py::test_sums_are_in_the_order_of_the_kernels"),
    ("learn/ops.py", 'CrossEntropy(ce_weight, part("ce.")) if "ce.logp_s" in named else None', "None", COMPILED),
    ("learn/ops.py", 'return rows | {"temperature": sweep.temperature}, 1.0', "return rows, 1.0", COMPILED),
    ("hooks/transformers.py", "scale=scale, softcap=softcap, vocab_size=vocab_size)", "vocab_size=vocab_size)", HEAD_OF),
    ("hooks/transformers.py", "& attention[:, 1:].bool() & attention[:, :-1].bool()", "& attention[:, 1:].bool()",
     "test_hooks_transformers.py::test_left_padding_gives_the_same_rows_the_same_losses"),
    ("hooks/transformers.py", "mask = chosen[0] & chosen[-1]", "mask = chosen[0]",
     "test_hooks_transformers.py::test_labels_and_a_completion_mask_mean_the_same_tokens_and_both_must_allow_one"),
    ("hooks/transformers.py", "share = (mask.sum() / num_items_in_batch).float()", "share = 1.0", MICRO),
    ("hooks/transformers.py", "return DistilledBatch(out.loss * share,", "return DistilledBatch(out.loss,", MICRO),
    ("hooks/transformers.py", "hasattr(node, \"variable\")", "False", HOOKED + "a_model_that_head_cannot_describe_is_refused_with_the_reason"),
    ("hooks/transformers.py", "self.calls.append(_Call(layer, hidden, weight, bias, probes))", "self.calls.append(_Call(layer, hidden, layer.weight, bias, probes))",
     HOOKED + "a_head_is_read_where_its_forward_reads_it"),
    ("hooks/transformers.py", "or torch.is_grad_enabled() != self.grad_enabled", "", HOOKED + "a_quantised_products_own_function_is_refused"),
    ("hooks/transformers.py", "return run(*args, **named)", "return nn.Linear.forward(output, *args, **named)", HOOKED + "what_wraps_an_output_layer_is_run"),
    ("hooks/transformers.py", "weight.is_leaf and now is not weight", "False", HOOKED + "an_offloaded_head_is_taken_through_its_hook_unless_it_is_to_learn"),
    ("hooks/transformers.py", "if sharded and hidden.requires_grad", "if False", SHARDED),
    ("hooks/transformers.py", "return now, call.bias if layer is None else layer.bias", "return weight, layer.bias", SHARDED),
    ("hooks/transformers.py", "if weight.numel() and not weight.untyped_storage().size():", "if False:", "test_parallel.py -k fsdp1_frees"),
    ("hooks/transformers.py", "return weight * loss", "return loss", EXPERTS),
    ("hooks/transformers.py", "hidden=_BackwardTo.apply(rows.hidden, router * weight)", "hidden=rows.hidden", EXPERTS),
    ("hooks/transformers.py", "value is None or isinstance(value, Tensor)", "True", HOOKED + "entries_of_a_batch_that_are_no_tensors_are_named"),
    ("hooks/transformers.py", "value.is_floating_point():", "False:", HOOKED + "images_that_a_text_model_leaves_unread_are_warned_of"),
    ("hooks/trl.py", "scales_s, scales_t = ((found.scale", "_ = ((found.scale", TRAINED + "the_loss_is_that_of_the_models_own_logits_whatever_their_configs_say"),
    ("hooks/trl.py", "weights_s, weights_t = ((found.weight", "_ = ((found.weight", TRAINED + "adapters_that_change_the_heads_product_alone_are_taken"),
    ("hooks/trl.py", "        self._probe()\n", "", TRAINED + "models_that_are_no_head_are_refused_when_the_trainer_is_made"),
    ("hooks/trl.py", "loss = loss + self._router", "loss = loss + 0 * self._router", TRAINED + "experts_own_loss_is_added_by_the_models_coefficient_and_logged"),
    ("hooks/trl.py", "module.training = mode", "pass", TRAINED + "probing_leaves_modes_as_they_are"),
    ("distributed/shards.py", "weakref.ref(group)", "lambda: group", "test_parallel.py::test_no_graph_keeps_a_process_group"),
    ("sources/pair.py", "self.pair.topk.check_values(self.pair.vocab, rows)", "self.pair.topk.check_values(self.pair.vocab, None)", JUNK),
    ("sources/pair.py", "labels.where(mask, IGNORE_LABEL)", "labels", JUNK_COMPILED),
    ("sources/pair.py", "temperature.where(mask, 1.0) if", "temperature if", JUNK_COMPILED),
    ("sources/topk.py", "rows is None else (self.ids[rows], self.logp[rows])", "rows is None else (self.ids[:0], self.logp[:0])", "test_topk.py::test_what_rows_in_use_hold_is_checked"),
    ("learn/divergence_loss.py", "request.check_values(None if kept is None else ids)", "request.check_values(None)", JUNK),
    ("inspect/page.py", "        autoescape=True,\n        finalize=_inert,\n", "", PAGE),
    ("inspect/page.py", "(?i)[<>&]|h(?=ttp)", "(?i)h(?=ttp)", PAGE),
    ("opd/train.py", "first=rollouts.prompt_width - 1)", "first=rollouts.prompt_width)", LOOP_GRAD),
    ("opd/rollout.py", "stops.cumsum(1) - stops.long() == 0", "stops.cumsum(1) == 0",
     "test_opd.py::test_rollout_masks_hold_the_end_token_and_nothing_after_it"),
    ("opd/rollout.py", "attention_mask=attention, ", "",
     "test_opd.py::test_left_padding_changes_neither_what_is_sampled_nor_the_hidden_states"),
    ("opd/rollout.py", "model.generation_config = GenerationConfig()", "pass",
     "test_opd.py::test_a_checkpoints_generation_config_changes_nothing_that_is_drawn_and_stays_with_it"),
    ("opd/rollout.py", "model.generation_config = own", "pass",
     "test_opd.py::test_a_checkpoints_generation_config_changes_nothing_that_is_drawn_and_stays_with_it"),
    ("opd/rollout.py", "torch.manual_seed(seed)", "pass",
     "test_opd.py::test_sampling_leaves_the_random_state_and_the_models_modes_as_they_were"),
    ("opd/rollout.py", "return scores[:, : self.count]", "return scores",
     "test_opd.py::test_heads_padded_to_another_size_share_the_smaller_vocabulary"),
    ("opd/pair.py", "if self.takes_positions else {}", "if False else {}",
     "test_opd.py::test_left_padding_changes_neither_what_is_sampled_nor_the_hidden_states"),
    ("opd/train.py", "counts += _histogram(stats.entropy_s, top)", "counts = _histogram(stats.entropy_s, top)",
     "test_opd.py::test_an_evaluation_is_the_same_in_chunks_of_any_size"),
    ("opd/train.py", "nats += stats.kl_rev", "nats = stats.kl_rev", "test_opd.py::test_an_evaluation_is_the_same_in_chunks_of_any_size"),
    ("plan/costs.py", "1 + 2 * rho, rho, (1 + rho)", "1 + 2 * rho, 1, (1 + rho)", "test_costs.py"),
    ("plan/costs.py", "cost(\"two sweeps\", 1 + 3 * rho", "cost(\"two sweeps\", 1 + 2 * rho", "test_costs.py"),
]  # fmt: skip

RANKING = [
    ("(q * (rows.sum().double() - 1))", "(q * rows.sum().double())", SELECT),
    ("torch.where(rows, x, torch.inf).double().sort()", "x.double().sort()", SELECT),
    ("(1 - part) * below + part * above", "below", SELECT),
    ("torch.where(x.isposinf(), 1.0, torch.where(width", "torch.where(x.isposinf(), 0.0, torch.where(width", SELECT),
    ("torch.where(width > 0, (x - low) / width, 0.0)", "(x - low) / width", SELECT),
    ("below.double() / (n - 1), 1.0)", "below.double() / n, 1.0)", SELECT),
    ("scores.argsort(descending=True, stable=True)", "scores.flip(0).argsort(descending=True, stable=True)", SELECT),
    ("order = order[(~eligible[order]).argsort(stable=True)]\n", "order = order\n", SELECT),
    ("population[order].long()", "eligible[order].long()", SELECT),
    ("+ 1e-6).floor()", ").floor()", SELECT),
    ("next_best = torch.where(quota < m, next_best, -torch.inf)\n", "next_best = next_best\n", SELECT),
    ("- start < quota) & eligible[order]", "- start < quota)", SELECT),
    ("same[1:] = ordered[1:] == ordered[:-1]", "same[1:] = False", SELECT),
]  # fmt: skip

RULES = [
    ("inside = inside & (x > cut_at(above, x, rows))", "inside = inside & (x >= cut_at(above, x, rows))"),
    ("inside = inside & (x < cut_at(below, x, rows))", "inside = inside & (x <= cut_at(below, x, rows))"),
    ("population = population & ~value.isnan()", "population = population"),
    ('if self.scope == "batch":\n            group = torch', 'if self.scope == "x":\n            group = torch'),
    ("(high + low * (1 - high))", "(high + low)"),
    ("torch.where(d.isinf(), d, d * (1 - clipped_entropy", "torch.where(d.isinf(), 0 * d, d * (1 - clipped_entropy"),
    ("d * (1 - clipped_entropy(values, population))", "d * clipped_entropy(values, population)"),
    ("(entropy < cut_at(", "(entropy > cut_at("),
    ("eligible & (d > cut_at(", "eligible | (d > cut_at("),
    ("torch.xlogy(self.alpha, values", "torch.xlogy(1.0, values"),
    ("torch.xlogy(self.gamma, values", "torch.xlogy(1.0, values"),
    ("exponential_(generator=self.generator)", "uniform_(generator=self.generator)"),
    ("- runner_up))", "))"),
    ("torch.where(mask, 1 / inclusion, 0.0)", "torch.where(mask, inclusion, 0.0)"),
    ("torch.where(log_w > -torch.inf, log_w - largest, zero)", "log_w - largest"),
    ("low_entropy = h < cut_at", "low_entropy = h <= cut_at"),
    ("low_divergence = ~(d > cut_at(", "low_divergence = (d < cut_at("),
    ("1 + 2 * low_entropy.to(torch.int8) + low_divergence", "1 + low_entropy.to(torch.int8) + 2 * low_divergence"),
    ("quantile(entropy, population, 0.98)", "quantile(entropy, population, 0.9)"),
    ("torch.arange(math.prod(shape), device=device) // max(tokens, 1)", "torch.arange(math.prod(shape), device=device) * 0"),
    ("bound = self.keep * n_rows + (1 - self.keep) * self.min_rows", "bound = self.keep * n_rows + self.keep * self.min_rows"),
    ("n_groups * max(self.keep, self.min_rows)", "n_groups * self.keep"),
    ("spare, ids = (~self.mask).sort(stable=True)", "spare, ids = (~self.mask).sort(stable=True, descending=True)"),
]  # fmt: skip

ROW_WEIGHTS = [
    ("(1 - share).clamp(min=self.floor)", "1 - share"),
    ("entropy / self.zero_at", "entropy"),
    ("1 - share_of_largest(values[\"entropy_t\"]", "share_of_largest(values[\"entropy_t\"]"),
    ("(1 + self.student * unsure_s)", "(1 + self.teacher * unsure_s)"),
    ("product * valid.sum() / torch.where", "product / torch.where"),
    ("torch.where(valid, product, 0.0).sum()", "product.sum()"),
    ("self.gamma * (1 - torch.where(banned, share_of_banned, share))", "self.gamma * torch.where(banned, share_of_banned, share)"),
    ("torch.where(banned, share_of_banned, share))", "share)"),
    ("torch.where(valid, log_ratio(values).abs(), 0.0)", "log_ratio(values).abs().nan_to_num(0.0, torch.inf)"),
    ("torch.where(logp_s == logp_t, 0.0, logp_t - logp_s)", "logp_t - logp_s"),
    ("(values[\"logp_s\"].double() - values[\"rollout_logp\"]).exp()", "(values[\"rollout_logp\"].double() - values[\"logp_s\"]).exp()"),
    (".clamp(self.low, self.high)", ".clamp(max=self.high)"),
    ("sums_of_groups(valid.long(), group)", "sums_of_groups(torch.ones_like(valid).long(), group)"),
    ("(valid & (values[self.by] < self.threshold))", "(values[self.by] < self.threshold)"),
    ("(before + drifted).double()", "before.double()"),
    ("(1 - self.drop * (before + drifted).double()).clamp(min=0.0)", "(1 - self.drop * (before + drifted).double())"),
    ("return torch.where(unmasked_rows, weights, 0.0)", "return weights"),
    ("valid = valid & ~value.isnan()", "pass"),
    ("before, total = until - until.take(start), sums", "before, total = until, sums"),
    ("order = group.argsort(stable=True)", "order = torch.arange(group.numel())"),
    ("        if self.by in TOP_FIELDS:\n            check", "        if False:\n            check"),
    ("within(values[self.by], valid, self.above, self.below)", "within(values[self.by], valid, self.above, None)"),
]  # fmt: skip

GATES = [
    ("learn/gradient_sweep.py", "return (gate * value).masked_fill(out, 0.0), scalars | {GATE: gate}", "return gate * value, scalars | {GATE: gate}", GATED),
    ("learn/gradient_sweep.py", "{name: scalar.masked_fill(out, 0.0) for name, scalar in scalars.items()}", "dict(scalars)", GATED_TRITON),
    ("learn/gradient_sweep.py", "_zero(measured) if objective.gates else torch.zeros_like", "torch.zeros_like", GATED),
    ("learn/gradient_sweep.py", "objective.gates[i][rows.ids]", "objective.gates[0][rows.ids]", GATED),
    ("learn/gradient_sweep.py", "return push * term.rows[GATE][part] if GATE in term.rows else push", "return push", GATED),
    ("learn/gradient_sweep.py", "return tuple([gate[ids] for gate in self.gates])", "return tuple([gate[: len(ids)] for gate in self.gates])", GATED),
    ("learn/divergences.py", "g if gate is None else g.mul_(gate).masked_fill_(gate == 0, 0.0)", "g if gate is None else g.mul_(gate)", GATED),
    ("learn/divergences.py", "g if gate is None else g.mul_(gate).masked_fill_(gate == 0, 0.0)", "g", GATED),
    ("learn/divergences.py", "        if self.term_gates or other.term_gates:", "        if self.term_gates:", GATED),
    ("learn/divergences.py", "        if self.term_gates:\n            raise ValueError(\"divergence: a Gated cannot be sc", "        if False:\n            raise ValueError(\"divergence: a Gated cannot be sc", GATED),
    ("learn/gated.py", "plain = divergence.max_per_row is None and not divergence.term_gates", "plain = divergence.max_per_row is None", GATED),
    ("learn/gated.py", "gates += [_checked_gate(gate)] * len(divergence.terms)", "gates += [_checked_gate(gate)]", GATED),
    ("learn/gated.py", "return Gated(self.gates, finite_number", "return Gated(self.gates, None and finite_number", GATED),
    ("learn/gated.py", 'above=finite_number("threshold", threshold)', 'below=finite_number("threshold", threshold)', GATED),
    ("learn/gated.py", "return torch.tensor(number)", "return torch.tensor(1.0)", GATED),
    ("learn/gated.py", "rows = next((rows for known, rows in found if known is gate), None)", "rows = None", GATED),
    ("learn/gated.py", "given = gate(stats, row_mask, rollout_ids) if", "given = gate(stats, None, rollout_ids) if", GATED),
    ("learn/divergence_loss.py", "known = _measured_for_gates(divergence, request) if stats is None else stats", "known = _measured_for_gates(divergence, request)", GATED),
    ("learn/topk_loss.py", "y.masked_fill(out, 0.0), lp_t.masked_fill(out, -math.log(y.shape[1]))", "y, lp_t", GATED),
    ("learn/topk_loss.py", "Objective(divergence, gates=gates), options", "Objective(divergence), options", GATED),
    ("distillation/distill.py", "        if any(map(statistics_read, gates)):\n            self.learns_early = False", "        if any(map(statistics_read, gates)):\n            pass", GATED),
    ("distillation/distill.py", 'if getattr(reader, "needs", frozenset()) & TOP_FIELDS:', 'if hasattr(reader, "top_k"):', GATED),
    ("distillation/distill.py", "gates_of(divergence, stats, batch.row_mask, batch.rollout_ids, shape, device)", "gates_of(divergence, stats, batch.row_mask, None, shape, device)", GATED),
    ("backends/triton/row_grad.py", "g = tl.where(gate != 0.0, more, g)", "g = more", GATED_TRITON),
    ("backends/triton/row_grad.py", "g, w * gate, l_s, l_t", "g, w, l_s, l_t", "test_gated.py::test_the_sampled_token_gets_its_gated_push[triton]"),
    ("backends/triton/row_grad.py", "-1 if term.gate is None else len(rows) + len(names) - 1", "-1 if term.gate is None else len(rows) - 1", GATED_TRITON),
]  # fmt: skip

VERL, TRAINER = "test_hooks_verl.py", "test_hooks_trl.py -k weigh"
HOOK_LOSSES = [
    ("hooks/verl.py", "divergence = divergence.at(out.stats, mask, rollouts)", "divergence = divergence.at(out.stats)", VERL),
    ("hooks/verl.py", "weights * self.row_weights(out.stats, mask, rollouts)", "weights * self.row_weights(out.stats, mask)", VERL),
    ("hooks/verl.py", "following = tokens.values().to(mask.device).long().roll(-1)", "following = tokens.values().to(mask.device).long()", VERL),
    ("hooks/verl.py", "rows.numel() / torch.where(out.plan.weight > 0, out.plan.weight, 1.0)", "rows.numel() / max(kept.row_ids.numel(), 1)", VERL),
    ("hooks/trl.py", "weight = kept if weigh is None else out.plan.weight", "weight = kept", TRAINER),
    ("hooks/trl.py", "self._row_weights if self.model.training else None", "self._row_weights", TRAINER),
    ("hooks/trl.py", "needs = self._divergence.needs.union(*(getattr", "needs = self._divergence.needs.union(*() and (getattr", TRAINER),
]  # fmt: skip

RULES_OF_PAPERS = [
    ('return values["entropy_s"] - values["entropy_t"]', 'return values["entropy_t"] - values["entropy_s"]'),
    ("torch.sigmoid(self._scores(values, population))", "self._scores(values, population)"),
    ("ce_s / (ce_t + self.epsilon)", "ce_t / (ce_s + self.epsilon)"),
    ("torch.where(ce_s.isinf() & ce_t.isinf(), 1.0,", "torch.where(ce_s.isinf() & ce_t.isinf(), 0.0,"),
    ("return (d * c).float()", "return (d + c).float()"),
    ("< self.top_k\n        return", "<= self.top_k\n        return"),
    ("(accepted == self.agreeing)", "(accepted != self.agreeing)"),
    ("torch.where(chosen, 1.0, self.other_weight)", "torch.where(chosen, self.other_weight, 1.0)"),
    ("quantile(x, finite, 0.05), quantile(x, finite, 0.95)", "quantile(x, finite, 0.0), quantile(x, finite, 1.0)"),
    ("torch.where(x.isposinf(), 1.0, inside)", "inside"),
    ("return torch.zeros_like(population, dtype=torch.float32)", "return torch.arange(population.numel()).float()"),
    ("check_measured_top_k(stats, self.top_k)", "pass"),
]  # fmt: skip

ADAKD = [
    ("self.beta * self._average + (1 - self.beta) * loss", "(1 - self.beta) * self._average + self.beta * loss"),
    ("self._average < self._anchor * (1 - self.tolerance)", "self._average < self._anchor"),
    ("self._average > self._anchor * (1 + self.tolerance)", "self._average > self._anchor"),
    ("keep = max(self.floor, keep * (1 - self.step))", "keep = keep * (1 - self.step)"),
    ("keep = min(1.0, keep * (1 + self.step))", "keep = keep * (1 + self.step)"),
    ("self.keep, self._anchor = keep, self._average", "self.keep = keep"),
    ("if self._seen <= self.warmup", "if self._seen < self.warmup"),
    ("if not math.isfinite(loss):", "if math.isinf(loss):"),
    ("base * torch.exp(-strength * hardness)", "base * torch.exp(strength * hardness)"),
    ("(h - m) / (h + m), 0.0)", "(h - m), 0.0)"),
    ("torch.where(rows & (h + m > 0)", "torch.where((h + m > 0)"),
    ("population = rows & kept.mask", "population = rows"),
    ("rollouts = rollouts if scope == \"rollout\" else torch.zeros_like(rollouts)", "rollouts = torch.zeros_like(rollouts)"),
    ("(count - 1).clamp(min=0) // 2", "count // 2"),
    ('"temperature_sq": True', '"temperature_sq": False'),
    ("total.item() / torch.distributed.get_world_size(self.group)", "total.item()"),
]  # fmt: skip

LISTS = [
    ("(-top.expm1() - fine.exp()", "(-top.exp() - fine.exp()", TOPK_STATS),
    ("fine = logp.double()", "fine = logp", "test_topk.py::test_a_tiny_rest_of_the_teacher_is_not_lost_in_cancellation"),
    ("none = (listed.sum(1) == vocab) | (no_rest & (rest <= NO_REST))", "none = listed.sum(1) == vocab",
     "test_topk.py::test_where_both_models_leave_nothing_to_the_rest_there_is_none"),
    ("none = (listed.sum(1) == vocab) | (no_rest & (rest <= NO_REST))", "none = no_rest & (rest <= NO_REST)",
     "test_topk.py::test_a_list_of_all_tokens_has_no_rest_however_short_of_one_its_mass"),
    ("rest.clamp(min=LEAST_REST)", "rest",
     "test_topk.py::test_what_the_student_bans_is_infinite_forward_and_what_the_teacher_bans_reverse "
     "test_topk.py::test_where_both_models_leave_nothing_to_the_rest_there_is_none " + TOPK_STATS),
    ("logp = logp.masked_fill(~listed, -torch.inf)\n", "logp = logp\n", TOPK_STATS),
    ("return logp.masked_fill(~listed.any(1, keepdim=True), torch.nan)", "return logp", "test_topk.py::test_a_nan_row_is_nan_and_its_neighbours_are_not"),
    ("logp.masked_fill(~hit.any(1), torch.nan)", "logp",
     "test_topk.py::test_a_label_has_a_teacher_log_probability_where_it_is_listed"),
    ('(measured["shift_rest"] - measured["shift_s"]) +', 'measured["shift_rest"] +', TOPK_STATS),
    ("(lp_t.exp() * (lp_t - lp_s)).sum(1)", "(lp_t.exp() * (lp_s - lp_t)).sum(1)", TOPK_STATS),
    ("(lp_s.exp() * (lp_s - lp_t)).sum(1)", "(lp_s.exp() * lp_s).sum(1)", TOPK_STATS),
    ("1 - ((0.5 * (lp_s + lp_t)).exp() * shared).sum(1)", "1 - (0.5 * (lp_s + lp_t)).exp().sum(1)", TOPK_STATS),
    ('"forward_kl": banned_s & ~banned_t', '"forward_kl": banned_s',
     "test_topk.py::test_where_both_models_leave_nothing_to_the_rest_there_is_none " + TOPK_STATS),
    ("inside = (place >= 0) & (place < tile.shape[1])", "inside = place >= 0", TOPK_STATS),
    ("torch.where(inside, -torch.inf, torch.inf).to(tile), \"amin\"", "torch.where(inside, -torch.inf, -torch.inf).to(tile), \"amin\"", TOPK_STATS),
    ("tile.scatter_add_(1, place, torch.where(inside, values, 0.0))", "tile.scatter_add_(1, place, values)", TOPK_GRAD),
    ("return -(lp_t.exp() * lp_t", "return -(lp_t", TOPK_STATS),
]  # fmt: skip

SURE = "test_sure_rows.py::test_gradients_of_sure_rows_are_those_of_float64"
WEIGHTS = "test_distill.py::test_a_row_of_a_weight_that_is_not_finite_is_dropped_and_counted"
LEARNING = [
    ("learn/gradient_sweep.py", "torch.where(sure.unsqueeze(1), 0.0, g.gather(1, place))", "g.gather(1, place)", SURE),
    ("learn/gradient_sweep.py", "*where, balance=True", "*where, balance=False",
     "test_sure_rows.py -k kernels"),
    ("learn/gradient_sweep.py", "torch.where(self.columns < 0, 0.0, -others)", "torch.where(self.columns < 0, 0.0, others)", SURE),
    ("learn/gradient_sweep.py", "values if self.slope is None else values * self.slope", "values", SURE),
    ("learn/gradient_sweep.py", "sure = z_s.amax(1) > bound", "sure = z_s.amax(1) > bound + 30", SURE),
    ("learn/gradient_sweep.py", "total[:1] += begun", "pass", "test_sure_rows.py::test_a_sure_rows_entry_reaches_both_leaves_of_a_16_bit_head"),
    ("learn/gradient_sweep.py", "return any(term.divergence.sums for term in self.terms)", "return False", "test_sure_rows.py -k tvd"),
    ("learn/divergences.py", "(lp_s - lp_t).sign_().mul_(p_s)", "(p_s - exp(lp_t)).sign_().mul_(p_s)", "test_sure_rows.py -k TVD"),
    ("learn/divergences.py", "near = gap.abs() < 1", "near = gap.abs() < 0", "test_sure_rows.py -k alpha_beta"),
    ("distillation/distill.py", "torch.where(real & finite, w, 0.0), finite", "torch.where(real, w, 0.0), finite", WEIGHTS),
    ("distillation/distill.py", "usable = learned.real & finite & torch", "usable = learned.real & torch", WEIGHTS),
    ("distillation/one_sweep.py", "        return *upstream, None, None, *once", "        return None, None, None, *once", "test_distill.py::test_weights_get_the_same_gradient_in_one_sweep_as_in_two"),
    ("distillation/one_sweep.py", "passes > 1 or dtype == torch.float16", "passes > 1", "test_distill.py::test_fp16_gradients_are_rounded_after_the_loss_scale"),
    ("learn/gradient_sweep.py", "                into += self.weight\n", "                into += self.weight.to(student.weight.dtype)\n", "test_distill.py::test_a_wider_main_grad_gets_the_sum_before_it_is_rounded"),
    ("learn/gradient_sweep.py", "return self.ce_weight == 1", "return False", "test_distill.py::test_the_label_loss_alone_keeps_rows_whose_divergence_is_infinite"),
    ("sources/engines.py", "-math.inf if logp == VLLM_MINUS_INFINITY else logp", "logp", "test_topk.py::test_minus_9999_is_minus_infinity_as_vllms_server_means_it"),
    ("learn/gradient_sweep.py", "torch.where(value > limit, 0.0, factor)", "factor", CLIP),
    ("learn/gradient_sweep.py", "value.clamp(max=limit) * factor", "value * factor", CLIP),
    ("learn/gradient_sweep.py", "of_term, scalars = weight * term.value(row)", "of_term, scalars = term.value(row)", FAMILY),
    ("learn/gradient_sweep.py", "torch.where(labels == IGNORE_LABEL, 0.0, self.at_rows[\"logp_s\"])", "self.at_rows[\"logp_s\"]", CE),
    ("learn/divergence_loss.py", "None if known is None or known._partial else", "None if known is None else",
     "test_distill.py::test_statistics_with_rows_left_out_are_measured_again"),
    ("learn/divergence_loss.py", "if not _same(objective.temperature, stats._temperature) or", "if",
     "test_losses.py::test_statistics_from_another_temperature_are_measured_again"),
    ("learn/gradient_sweep.py", "masked_fill(of_s.isnan() | of_t.isnan(), math.nan)", "clone()",
     "test_distill.py::test_the_label_loss_alone_drops_broken_rows_and_no_others"),
    ("learn/gradient_sweep.py", "    if not torch.is_grad_enabled():\n        return grads", "    return grads",
     "test_losses.py::test_a_gradient_penalty_is_refused_rather_than_taken_for_a_constant"),
    ("learn/topk_loss.py", "return loss.masked_fill(invalid, torch.nan)", "return loss", TOPK),
    ("learn/gradient_sweep.py", "return (upstream != 0) & self.finite", "return upstream != 0",
     "test_losses.py::test_a_row_without_a_finite_loss_has_gradient_zero_and_spoils_no_other"),
    ("learn/gradient_sweep.py", "return (upstream != 0) & self.finite", "return self.finite",
     "test_losses.py::test_a_zero_upstream_gradient_leaves_its_row_out_of_the_sweep"),
    ("learn/gradient_sweep.py", "up = upstream[part] * student.scale\n        found =",
     "up = upstream[part]\n        found =", LEAVES),
    ("learn/gradient_sweep.py", "1 - (z_s / student.softcap).square_()", "1 - (z_s / student.softcap)", LEAVES),
    ("learn/gradient_sweep.py", "return g.mul_(weights.unsqueeze(1) / tau)", "return g.mul_(weights.unsqueeze(1))", ROW_TAU),
    ("learn/gradient_sweep.py", "gradient_of_tile(over_(z_s, tau), over_(z_t, tau)", "gradient_of_tile(over_(z_s, tau), z_t", ROW_TAU),
    ("learn/gradient_sweep.py", "sums_of_tile(over_(z_s, tau), over_(z_t, tau)", "sums_of_tile(z_s, z_t", ROW_TAU),
    ("learn/gradient_sweep.py", "total[name] + tile[name]", "tile[name]",
     FAMILY),
    ("learn/gradient_sweep.py", "g.masked_fill_((self.factor[part] == 0).unsqueeze(1), 0.0)", "pass",
     "test_losses.py::test_a_clipped_infinite_row_keeps_the_limit_and_has_gradient_zero"),
    ("learn/gradient_sweep.py", "up * self.factor[part]).unsqueeze(1) / self.sweep.temperature_at(part)", "up * self.factor[part]).unsqueeze(1)", SAMPLED),
    ("learn/gradient_sweep.py", "add_columns(tile, self.labels[part].unsqueeze(1), v0, -weight)", "pass", CE),
    ("learn/gradient_sweep.py", "weight = (self.labels[part] != IGNORE_LABEL).unsqueeze(1) * ce.weight", "weight = ce.weight", CE),
    ("learn/gradient_sweep.py", "out.masked_fill_(others, 0.0)", "pass",
     "test_losses.py::test_an_inplace_gradient_takes_the_logits_storage_and_runs_once"),
    ("learn/topk_loss.py", "g.mul_(up[:, k : k + 1])", "g.mul_(1.0)", TOPK_GRAD),
    ("learn/gradient_sweep.py", "self.bias[self.v0 : self.v1] += g.sum(0)", "self.bias[self.v0 : self.v1] = g.sum(0)",
     "test_one_sweep.py::test_the_gradient_is_that_of_the_reference"),
    ("learn/gradient_sweep.py", "addmm_(out, a, b)", "mm(a, b, out=out)", "test_losses.py test_one_sweep.py -k tiny_workspace"),
    ("learn/gradient_sweep.py", "self.weight[self.walked :].zero_()", "pass",
     "test_losses.py::test_gradients_of_every_leaf_of_a_head_are_no_worse_than_eager_fp32"),
    ("learn/gradient_sweep.py", "self.hidden.addcmul_(self.dropped.unsqueeze(1), self.row_sum.unsqueeze(0) / student.vocab)", "pass",
     "test_backward.py::test_a_filtered_gradient_does_not_feel_what_is_added_to_every_row_of_the_head"),
    ("learn/grad_filter.py", "out = bool((size.amax(1) < bound).all())", "out = bool((size.amax(1) < bound).any())",
     "test_backward.py::test_a_filter_skips_rare_tokens_within_its_bounds_and_says_how_many"),
    ("learn/gradient_sweep.py", "dtype = torch.float32 if wide else weight.dtype", "dtype = weight.dtype",
     "test_one_sweep.py::test_one_sweep_is_two_in_16_bits"),
    ("distillation/distill.py", "and not watched", "", "test_backward.py::test_hooks_see_the_gradient_of_a_backward_at_once"),
]  # fmt: skip

SWEEP = [
    ("self.slot[self.owner[gone]] = -1", "pass"),
    ("self.owner[gone] = -1", "pass"),
    ("gone = (self.owner >= 0) & ~others[self.owner]", "gone = (self.owner >= 0) & others[self.owner]"),
    ("self.rows[target] = self.rows[source]", "pass"),
    ("held & (self.slot[ids] >= ids.numel())", "held & (self.slot[ids] > ids.numel())"),
    ("return ids[~held]\n", "return ids[:0]\n"),
    ("factor = upstream * self.scale", "factor = upstream"),
    ("factor = upstream * self.scale", "factor = upstream / self.scale"),
    ("weights.detach() / total, self.divisor / total", "weights.detach() / total, self.divisor / self.divisor"),
    ("hidden = hidden.masked_fill(dead, 0.0)  #", "pass  #"),
    ("gradients, self.gradients = self.gradients, None", "gradients = self.gradients"),
    ("pair.student.scale, pair.student.softcap = self.student.scale, self.student.softcap", "pass"),
    ("stash.rows[: ids.numel()].mul_(share.unsqueeze(1))", "stash.rows[: ids.numel()]"),
    ("if isinstance(tau, Tensor) or tau != 1.0:\n                student", "if isinstance(tau, Tensor):\n                student"),
    ("local = local[: slots.numel()]", "local = local[: slots.numel() - 1]"),
]  # fmt: skip

AROUND = [
    ("backends/eager/online.py", "(z / temperature - out[f\"shift_{model}\"]) - out", "(z - out[f\"shift_{model}\"]) - out",
     "test_stats.py::test_a_temperature_divides_both_models_logits"),
    ("backends/eager/online.py", "torch.where(z <= FLOOR, -torch.inf, logp)", "logp", LOWEST),
    ("measure/sweep.py", "torch.where(inside, t.gather(1, place).squeeze(1), z)", "t.gather(1, place).squeeze(1)", TILES),
    ("measure/sweep.py", "margin = (values[:, 0] - second) / temperature", "margin = values[:, 0] - second",
     "test_stats.py::test_a_temperature_divides_both_models_logits"),
    ("measure/sweep.py", "torch.where(second <= online.FLOOR, torch.inf, margin)", "margin", LOWEST),
    ("measure/sweep.py", "fields[\"agree\"] = whole & (", "fields[\"agree\"] = (", BROKEN),
    ("measure/sweep.py", "torch.where(listed, logp.exp(), 0.0)", "logp.exp()", "test_stats.py::test_a_banned_token_is_in_no_top_list"),
    ("measure/sweep.py", "torch.where(hit.any(1), hit.int().argmax(1), top_k)", "hit.int().argmax(1)", STATS),
    ("stats.py", "| (labels == IGNORE_LABEL)).all()", ").all()", LABELS),
    ("backends/eager/toplist.py", "| (0xFFFFFFFF - ids)", "| ids", TIES),
    ("backends/eager/toplist.py", "bits = (x + 0.0).view(torch.int32)", "bits = x.view(torch.int32)",
     "test_stats.py::test_zeros_of_either_sign_tie"),
    ("backends/eager/toplist.py", "ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)", "ordered = bits", STATS),
    ("sources/pair.py", "out.mul_(source.scale / source.softcap)", "out.mul_(1 / source.softcap)", HEADS),
    ("sources/pair.py", "elif source.scale != 1.0:", "elif source.scale < 0.0:", HEADS),
    ("sources/pair.py", "source.bias[v0:v1].to(source.dtype)", "source.bias[: v1 - v0].to(source.dtype)", HEADS),
    ("sources/pair.py", "x[rows // x.shape[1], rows % x.shape[1]]", "x[rows % x.shape[0], rows // x.shape[0]]",
     "test_stats.py::test_strided_batches_and_heads_measure_as_contiguous_ones"),
    ("learn/divergences.py", 'w * row["kl_t"] + (1 - w) * row["kl_s"]', '(1 - w) * row["kl_t"] + w * row["kl_s"]', FAMILY),
    ("learn/divergences.py", "row[self._blend] / (self.alpha - 1)", "row[self._blend] / self.alpha", FAMILY),
    ("learn/divergences.py", "whole.mul_(a / (a + b))", "whole.mul_(b / (a + b))", FAMILY),
    ("learn/divergences.py", '"sum_g": cross.div_(-a)', '"sum_g": cross.div_(a)', FAMILY),
    ("learn/divergences.py", "torch.where(jeffreys.isinf(), jeffreys, row", "torch.where(jeffreys.isnan(), jeffreys, row", FINITE),
    ("learn/divergences.py", "k.clamp(-self.clip, self.clip)", "k.clamp(max=self.clip)", SAMPLED),
    ("learn/divergences.py", 'torch.where(row["logp_s"].isfinite(), self.value(row), 0.0)', "self.value(row)",
     "test_divergences.py::test_a_sample_that_the_student_bans_has_the_clipped_value_and_no_gradient"),
    ("distillation/distill.py", "weights.sum() if kind == \"kept\" else self.valid_rows.sum().float()", "weights.sum() if kind == \"kept\" else self.row_mask.sum().float()",
     "test_distill.py::test_the_normalizer_all_counts_unmasked_rows_that_are_not_nan"),
    ("distillation/distill.py", "return torch.where(total == 0, 1.0, total)", "return total", "test_distill.py::test_nothing_kept_is_a_zero_with_a_graph"),
    ("distillation/distill.py", "invalid = invalid | measured[\"logsum_t\"].isnan()", "pass",
     "test_distill.py::test_the_normalizer_all_counts_unmasked_rows_that_are_not_nan"),
    ("distillation/distill.py", "usable = learned.real & finite & torch.isfinite(learned.losses.detach())", "usable = learned.real & finite",
     "test_distill.py::test_kept_rows_without_a_finite_loss_weigh_nothing_are_counted_and_warned_of"),
    ("distillation/distill.py", "dropped = (learned.real & ~usable).sum()", "dropped = learned.real.sum() * 0",
     "test_distill.py::test_kept_rows_without_a_finite_loss_weigh_nothing_are_counted_and_warned_of"),
    ("distillation/distill.py", "temperature=1.0 if adaptive else", "temperature=2.0 if adaptive else",
     "test_distill.py::test_a_callable_temperature_is_learned_at_and_measured_at_one"),
    ("learn/gradient_sweep.py", "factor = factor * self.temperature_at(ids) ** 2",
     "factor = factor * self.temperature_at(ids)",
     "test_distill.py::test_a_temperature_is_measured_and_learned_at"),
    ("distillation/distill.py", "for factor in (self.row_weights, kept._weights):", "for factor in (self.row_weights,):",
     "test_distill.py::test_the_unbiased_weights_of_a_rule_weigh_its_rows"),
    ("distillation/distill.py", "self.select.needs or any(map(statistics_read, readers))", "self.select.needs", WEIGHING),
    ("distillation/distill.py", "rule.needs.union(*map(statistics_read, readers))", "rule.needs", WEIGHING),
    ("distillation/distill.py", "self.row_weights(stats, self.batch.row_mask, self.batch.rollout_ids)",
     "self.row_weights(stats, None, self.batch.rollout_ids)", WEIGHING),
    ("distillation/one_sweep.py", "step.weigh(self.stats)", "step.weigh(step.batch.record({}, 1.0, partial=True))", WEIGHING),
    ("distillation/one_sweep.py", "weights = weights * self.losses[ids].isfinite()", "weights = weights",
     "test_backward.py::test_a_kept_row_of_infinite_loss_has_no_part_in_a_backward_at_once"),
    ("select/rollouts.py", "order = key.flip(0).argsort(stable=True)", "order = len(key) - 1 - key.argsort(stable=True)", PAPERS),
    ("select/rollouts.py", "drop = (count - 1).clamp(min=0, max=self.drop)", "drop = count.clamp(min=0, max=self.drop)", PAPERS),
    ("select/rollouts.py", "(before + drifted.long() < self.n)", "(before < self.n)", PAPERS),
    ("select/rollouts.py", "return population.double().cumsum(0)", "return -population.double().cumsum(0)", PAPERS),
    ("select/rule.py", "kept = self.second(stats, among.mask, rollout_ids)", "kept = self.second(stats, row_mask, rollout_ids)", PAPERS),
    ("select/rule.py", "min(self.first.capacity(n_rows, n_groups), self.second.capacity(n_rows, n_groups))",
     "1", PAPERS),
    ("select/adakd.py", '"average": self._average, "anchor"', '"average": self._anchor, "anchor"',
     "test_contracts.py::test_a_focus_goes_on_from_its_state_dict_after_a_journey_through_json"),
    ("distillation/importance.py", "lambda stats: -stats.logp_s", "lambda stats: stats.logp_s", "test_importance.py"),
    ("distillation/importance.py", "stats.hellinger_sq.sqrt()", "stats.hellinger_sq", "test_importance.py"),
    ("opd/disk.py", "folder.unlink() if folder.is_symlink() else shutil", "shutil",
     "test_faults.py::test_a_run_writes_and_removes_nothing_outside_its_folder"),
    ("opd/checkpoint.py", 'not re.fullmatch(r"checkpoint-\\d+", name) or not', "not",
     "test_faults.py::test_a_pointer_out_of_the_folder_is_no_checkpoint"),
    ("opd/weights.py", ', "trust_remote_code": False}', ', "trust_remote_code": True}',
     "test_faults.py::test_no_code_of_a_checkpoint_is_run"),
]  # fmt: skip

CUT_SHORT = "test_faults.py::test_an_interrupted_write_leaves_a_checkpoint_to_go_on_from"
TOGETHER = "test_runs.py::test_of_two_runs_that_begin_together_in_a_new_folder_one_ends_with_a_line"
CHANGED = "test_runs.py::test_a_run_whose_task_teacher_or_student_has_changed_is_not_resumed"
MOMENTS = "test_runs.py::test_an_incomplete_or_foreign_state_of_the_optimizer_is_not_resumed"
FOREIGN = "test_runs.py::test_a_truncated_or_foreign_file_of_a_run_is_one_line_that_names_it"
STATE = "test_runs.py::test_a_state_of_another_make_is_not_resumed"
LOG = "test_runs.py::test_a_log_without_a_row_of_each_step_is_not_resumed"
SYNCED = "test_runs.py::test_a_checkpoint_is_on_the_disk_before_it_is_the_newest_and_that_before_the_older_one_goes"
FULL = "test_runs.py::test_a_disk_that_is_full_is_one_line_and_the_last_checkpoint_stays"
SEEMING = "test_runs.py::test_a_folder_that_is_not_the_model_that_it_says_is_one_line_that_names_it"
COMPARED = "test_runs.py::test_a_truncated_or_foreign_run_is_not_compared"
VALUES = "test_runs.py::test_a_log_of_other_values_is_not_compared"
TABLES = "test_runs.py::test_a_table_of_another_make_is_one_line_that_names_its_file"

RUNS = [
    ("opd/checkpoint.py", "    disk.write_text(folder / \"latest\", target.name + \"\\n\")\n    for old in folder.glob(\"checkpoint-*\"):\n        if old != target:\n            disk.remove(old)\n",
     "    for old in folder.glob(\"checkpoint-*\"):\n        if old != target:\n            disk.remove(old)\n    disk.write_text(folder / \"latest\", target.name + \"\\n\")\n",
     f"{CUT_SHORT} {SYNCED}"),
    ("opd/disk.py", "                self.lock.acquire()\n", "                pass\n", TOGETHER),
    ("opd/cli.py", "        claim.take()\n        if not resumed:", "        if not resumed:", TOGETHER),
    ("opd/cli.py", '            checkpoint.check_output(folder, options.get("overwrite", False))\n        checkpoint.begin', "            pass\n        checkpoint.begin", TOGETHER),
    ("opd/checkpoint.py", "path.name != disk.LOCK for path", "path.name for path", TOGETHER),
    ("opd/origin.py", 'sha256_of(path) if path.is_file() else ""', '""', CHANGED),
    ("opd/origin.py", "{path.name} {sha256_of(path)}", "{path.name}", CHANGED),
    ("opd/checkpoint.py", 'if begun["sha256"].get(name) != now)', "if False)", CHANGED),
    ("opd/checkpoint.py", 'if state["step"] != int(', "if 0 and int(", "test_runs.py::test_a_checkpoint_of_another_step_is_not_resumed"),
    ("opd/checkpoint.py", "        if was != now:", "        if False:", "test_runs.py::test_a_checkpoint_of_another_run_is_not_resumed"),
    ("opd/cli.py", "if settings.steps < counters.step:", "if False:", "test_runs.py::test_a_run_is_not_resumed_to_an_earlier_step"),
    ("opd/checkpoint.py", "or files.get(name) != sums[name]", "", f"{MOMENTS} test_runs.py::test_weights_of_a_checkpoint_that_are_not_the_runs_are_not_resumed"),
    ("opd/checkpoint.py", "sums.keys() | files.keys()", "files.keys()", "test_runs.py::test_a_file_that_came_to_a_checkpoint_later_is_not_resumed"),
    ("opd/checkpoint.py", 'state.keys() == {"step", *MOMENTS}', 'state.keys() <= {"step", *MOMENTS}', MOMENTS),
    ("opd/checkpoint.py", "state[name].shape == weight.shape", "state[name].numel() == weight.numel()", MOMENTS),
    ("opd/checkpoint.py", "or (not whole and counters.step > counters.skipped)", "", MOMENTS),
    ("opd/checkpoint.py", "            loop.focus.load_state_dict(counters.focus)", "            pass", "test_runs.py::test_a_state_of_adakd_is_whole"),
    ("opd/checkpoint.py", "type(value) is int and value >= 0", "isinstance(value, int)", f"{FOREIGN} {STATE}"),
    ("opd/checkpoint.py", "or read[name] != value:", ":", "test_runs.py::test_settings_that_no_option_gives_are_not_resumed"),
    ("opd/checkpoint.py", "    if len(kept) <= step:", "    if False:", LOG),
    ("opd/checkpoint.py", '.get("step") == len(kept)', '.get("step") is not None', LOG),
    ("opd/checkpoint.py", "        gone = [\"student\", \"partial\"]", "        gone = [\"partial\"]", "test_runs.py::test_a_run_that_goes_on_loses_the_end_that_it_had"),
    ("inspect/objects.py", "if not math.isfinite(value := float(word)):", "value = float(word)\n        if False:", f"{FOREIGN} {COMPARED}"),
    ("inspect/objects.py", "    except RecursionError:", "    except KeyError:", FOREIGN),
    ("inspect/objects.py", "    except (OSError, UnicodeDecodeError) as error:", "    except OSError as error:", FOREIGN),
    ("opd/disk.py", "            sync(path)\n        sync(partial)", "            pass\n        sync(partial)", SYNCED),
    ("opd/disk.py", "            sync(path)\n        sync(partial)\n", "            sync(path)\n", SYNCED),
    ("opd/disk.py", "        os.replace(partial, target)\n        sync(target.parent)", "        os.replace(partial, target)", SYNCED),
    ("opd/disk.py", "        sync(partial)\n        os.replace(partial, path)", "        os.replace(partial, path)", SYNCED),
    ("opd/disk.py", "        os.replace(partial, path)\n        sync(path.parent)", "        os.replace(partial, path)", SYNCED),
    ("opd/checkpoint.py", '                disk.sync(folder / "log.jsonl")', "                pass", SYNCED),
    ("opd/disk.py", "    except (OSError, SafetensorError) as error:", "    except OSError as error:", FULL),
    ("opd/checkpoint.py", "    except UsageError:\n        disk.remove(partial)", "    except UsageError:\n        pass", FULL),
    ("opd/weights.py", "if any(path.is_absolute()", "if all(path.is_absolute()", SEEMING),
    ("opd/weights.py", 'or ".." in path.parts for path', "for path", SEEMING),
    ("opd/weights.py", "isinstance(value, int) and value > most", "isinstance(value, int) and value > 10**12", SEEMING),
    ("opd/weights.py", "        if shape != own[name]:", "        if False:", SEEMING),
    ("opd/weights.py", 'if not dtype.startswith(("F", "BF")):', "if False:", SEEMING),
    ("opd/weights.py", "if of_any_layer(name) in known", "if False", SEEMING),
    ("opd/weights.py", "if not weight.isfinite().all():", "if weight.isnan().all():", SEEMING),
    ("opd/weights.py", 'if (folder / "adapter_config.json").is_file():', "if False:", SEEMING),
    ("opd/weights.py", "            read_object(folder / name, argument)", "            pass", SEEMING),
    ("opd/pair.py", 'argument, source = "--resume", later', "source = later", "test_runs.py::test_of_a_resumed_run_the_folder_named_is_the_checkpoints"),
    ("opd/train.py", "self._expect_numbers(nats, sum(tally) == rows)", "pass", "test_runs.py::test_a_model_of_nan_ends_with_an_error_that_names_it"),
    ("opd/train.py", "self._expect_numbers(nats, sum(tally) == rows)", "self._expect_numbers(nats, True)", "test_runs.py::test_a_model_of_nan_ends_with_an_error_that_names_it"),
    ("opd/train.py", "local)))\n        self._expect_numbers(sums.kl, math.isfinite(sums.entropy))", "local)))", "test_runs.py::test_a_teacher_of_nan_for_one_token_ends_a_run_at_that_token"),
    ("opd/train.py", "0.0, rollouts))))\n        self._expect_numbers(sums.kl, math.isfinite(sums.entropy))", "0.0, rollouts))))", "test_runs.py::test_a_teacher_of_nan_for_one_token_ends_a_run_at_that_token"),
    ("inspect/curves.py", 'or row["step"] < 0', "", COMPARED),
    ("inspect/curves.py", "if not number_is and (name in COUNTS or row[name] is not None):", "if not number_is and row[name] is not None:", VALUES),
    ("inspect/curves.py", "if not any(panels):", "if False:", "test_runs.py::test_runs_with_nothing_to_draw_are_not_compared"),
    ("inspect/tokens.py", "if not all(isinstance(value, kinds[name]) for name, value in rollout.items()):", "if False:", TABLES),
    ("inspect/tokens.py", "if not all(isinstance(text, str) for text in getattr(self, name)):", "if False:", TABLES),
]  # fmt: skip

MUTANTS = [
    *(Mutant("backends/eager/online.py", *row) for row in ONLINE),
    *(Mutant("learn/divergences.py", *row, FAMILY) for row in ROW_GRAD),
    *(Mutant("backends/triton/_online.py", *row) for row in TRITON_ONLINE),
    *(Mutant("backends/triton/_family.py", *row) for row in TRITON_FAMILY),
    *(Mutant("backends/triton/" + file, *row) for file, *row in TRITON_ROWS),
    *(Mutant("backends/triton/linear_stats.py", *row) for row in LINEAR_STATS),
    *(Mutant("select/rule.py", *row) for row in RANKING),
    *(Mutant(one_of(row, "select/rule.py", "select/tip.py", "select/quadrants.py"), *row, SELECT) for row in RULES),
    *(Mutant("select/papers.py", *row, PAPERS) for row in RULES_OF_PAPERS),
    *(Mutant("select/weights.py", *row, WEIGHING) for row in ROW_WEIGHTS),
    *(Mutant("select/adakd.py", *row, ADAPTIVE) for row in ADAKD),
    *(Mutant(one_of(row, "sources/topk.py", "measure/topk_teacher.py"), *row) for row in LISTS),
    *(Mutant(*row) for row in LEARNING),
    *(Mutant(*row) for row in GATES),
    *(Mutant(*row) for row in HOOK_LOSSES),
    *(Mutant("distillation/one_sweep.py", *row, ONE) for row in SWEEP),
    *(Mutant(*row) for row in AROUND),
    *(Mutant(*row) for row in BORDERS),
    *(Mutant(*row) for row in RUNS),
    *(Mutant(one_of(row, "distributed/shards.py", "distributed/collectives.py"), *row, RANKS) for row in ACROSS_RANKS),
]


class AnyExample:
    """A pytest plugin: hypothesis is content with the first example that fails, and looks for no smaller one."""

    def pytest_configure(self, config: object) -> None:
        from hypothesis import Phase, settings

        settings.register_profile("any", phases=[Phase.explicit, Phase.generate])
        settings.load_profile("any")


class Result(NamedTuple):
    outcome: str  # "caught", "SURVIVED" or what went wrong
    seconds: float
    by: str  # the test that caught it


def run(mutant: Mutant | str) -> Result:
    """The tests of a mutant in a copy with its edit, or those named alone on the package as it is; in a process."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tests", "reference", "bench", "docs", "pyproject.toml", "README.md"):
            os.symlink(ROOT / name, Path(folder, name))
        shutil.copytree(ROOT / "tip_kernels", Path(folder, "tip_kernels"), ignore=shutil.ignore_patterns("__pycache__"))
        tests = mutant
        if isinstance(mutant, Mutant):
            path, tests = Path(folder, "tip_kernels", mutant.file), mutant.tests
            text = path.read_text()
            if text.count(mutant.old) != 1:
                return Result(f"no edit: found {text.count(mutant.old)} times", 0.0, "")
            path.write_text(text.replace(mutant.old, mutant.new))
        code, said = in_a_process(folder, [f"tests/{x}" if x.startswith("test_") else x for x in tests.split()])
    seconds = time.perf_counter() - began
    failed = re.search(r"^FAILED tests/(\S+)", said, flags=re.M)
    by = failed[1] if failed else ""
    died = {-signal.SIGALRM: "no end", -signal.SIGSEGV: "a crash"}  # which no test outlives
    outcome = {0: "SURVIVED", 1: "caught"} | dict.fromkeys(died, "caught")
    return Result(outcome.get(code, f"pytest says {code}: {said[-500:]}"), seconds, by or died.get(code, ""))


def in_a_process(folder: str, arguments: list[str]) -> tuple[int, str]:
    """(exit code, output) of pytest in the folder, in a fork that has torch loaded and the package not."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.chdir(folder)
        sys.path[:0] = [folder, str(Path(folder, "tests"))]
        os.environ["PYTHONPATH"] = folder
        signal.alarm(SECONDS)
        code = 3
        try:
            import pytest

            shared = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins among what forks share
            quiet = ["-x", "-q", "--tb=no", "-rf", "-p", "no:cacheprovider", *shared]
            code = int(pytest.main([*quiet, *arguments], plugins=[AnyExample()]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(write)
    with open(read, encoding="utf-8", errors="replace") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants whose file, edit or tests hold one of these")
    parser.add_argument("-j", "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.words or any(w in " ".join(m) for w in options.words)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / "tests")]
    with contextlib.redirect_stdout(io.StringIO()):
        for name in SHARED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    began, survivors = time.perf_counter(), 0
    with ProcessPoolExecutor(
        options.jobs, multiprocessing.get_context("fork")
    ) as pool:  # may have children of their own
        named = {mutant.tests for mutant in chosen}
        sound = sorted({test for tests in named for test in ([tests] if " -k " in tests else tests.split())})
        for tests, result in zip(sound, pool.map(run, sound), strict=True):
            if result.outcome != "SURVIVED":
                print(f"{tests} fails on the package as it is: {result.outcome} {result.by}", flush=True)
                pool.shutdown(cancel_futures=True)
                return 1
        print(
            f"{len(sound)} tests and files pass on the package as it is: {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        for mutant, result in zip(chosen, pool.map(run, chosen), strict=True):
            survivors += result.outcome != "caught"
            edit = f"{mutant.file}: {mutant.old.strip()[:60]!r} -> {mutant.new.strip()[:40]!r}"
            print(f"{result.outcome:8} {result.seconds:5.1f} s  {edit}  {result.by}", flush=True)
    print(f"{len(chosen)} mutants, {survivors} not caught, {time.perf_counter() - began:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
