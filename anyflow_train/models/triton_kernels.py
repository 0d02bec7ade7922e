"""Triton kernels for eager mode on CUDA, of which each reads its inputs and writes its results once.

Only `models.fused_gpu` imports this module, on a GPU: torch's builds for CPUs have no Triton. A row is a token, and
the columns are its channels. All arithmetic is in float32. Sums over rows are written as partial sums in a fixed order,
so that results do not depend on timing.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def layer_norm(
    x, shift, scale, out, mean, inverse, tokens, per_frame, by_sample, by_frame, width, plus, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute `(x - mean) * inverse * (plus + scale) + shift`. One program computes a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * width + columns, inside, other=0.0).to(tl.float32)
    middle = tl.sum(values, 0) / width
    values = tl.where(inside, values - middle, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + eps)
    at = (row // tokens) * by_sample + ((row % tokens) // per_frame) * by_frame + columns
    gain = plus + tl.load(scale + at, inside, other=0.0).to(tl.float32)
    values = values * factor * gain + tl.load(shift + at, inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), inside)
    tl.store(mean + row, middle)
    tl.store(inverse + row, factor)


@triton.jit
def layer_norm_backward(
    grad, residual, x, scale, mean, inverse, grad_x, sums, samples_frames, frames, per_frame, by_sample, by_frame,
    width, plus, ROWS: tl.constexpr, RESIDUAL: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of x, and partial sums of those of shift and scale. A program has `ROWS` rows of a frame.

    With `RESIDUAL`, it adds the gradient of the residual connection.
    """
    frame = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = (frame // frames) * by_sample + (frame % frames) * by_frame + columns
    gain = plus + tl.load(scale + at, inside, other=0.0).to(tl.float32)
    of_shift, of_scale = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for number in range(ROWS):
        place = part * ROWS + number
        known = inside & (place < per_frame)
        row = frame * per_frame + tl.minimum(place, per_frame - 1)
        given = tl.load(grad + row * width + columns, known, other=0.0).to(tl.float32)
        values = tl.load(x + row * width + columns, known, other=0.0).to(tl.float32)
        factor = tl.load(inverse + row)
        normed = tl.where(known, (values - tl.load(mean + row)) * factor, 0.0)
        inner = given * gain
        back = (inner - tl.sum(inner, 0) / width - normed * (tl.sum(inner * normed, 0) / width)) * factor
        if RESIDUAL:
            back += tl.load(residual + row * width + columns, known, other=0.0).to(tl.float32)
        tl.store(grad_x + row * width + columns, back.to(grad_x.dtype.element_ty), known)
        of_shift += given
        of_scale += given * normed
    if SUMS:
        parts = tl.num_programs(1)
        to = (frame * parts + part) * width + columns
        tl.store(sums + to, of_shift, inside)
        tl.store(sums + samples_frames * parts * width + to, of_scale, inside)


@triton.jit
def add_gated(x, update, gate, out, tokens, per_frame, by_sample, by_frame, width, BLOCK: tl.constexpr):
    """Compute `x + update * gate`. One program computes a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = (row // tokens) * by_sample + ((row % tokens) // per_frame) * by_frame + columns
    values = tl.load(update + row * width + columns, inside, other=0.0).to(tl.float32)
    values = values * tl.load(gate + at, inside, other=0.0).to(tl.float32)
    values += tl.load(x + row * width + columns, inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), inside)


@triton.jit
def add_gated_backward(
    grad, update, gate, grad_update, sums, frames, per_frame, by_sample, by_frame, width, ROWS: tl.constexpr,
    SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of `update`, and partial sums of that of `gate`. A program has `ROWS` rows of a frame."""
    frame = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = (frame // frames) * by_sample + (frame % frames) * by_frame + columns
    factor = tl.load(gate + at, inside, other=0.0).to(tl.float32)
    of_gate = tl.zeros([BLOCK], tl.float32)
    for number in range(ROWS):
        place = part * ROWS + number
        known = inside & (place < per_frame)
        row = frame * per_frame + tl.minimum(place, per_frame - 1)
        given = tl.load(grad + row * width + columns, known, other=0.0).to(tl.float32)
        tl.store(grad_update + row * width + columns, (given * factor).to(grad_update.dtype.element_ty), known)
        if SUMS:
            of_gate += given * tl.load(update + row * width + columns, known, other=0.0).to(tl.float32)
    if SUMS:
        tl.store(sums + (frame * tl.num_programs(1) + part) * width + columns, of_gate, inside)


@triton.jit
def rms_norm(x, weight, rotation, out, inverse, tokens, width, pairs, eps, ROTATE: tl.constexpr, HALF: tl.constexpr):
    """Compute `x * inverse * weight`, and rotate adjacent channels. One program computes a row of `2 HALF` channels."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, HALF)
    inside = 2 * columns < width
    even = tl.load(x + row * width + 2 * columns, inside, other=0.0).to(tl.float32)
    odd = tl.load(x + row * width + 2 * columns + 1, inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(even * even + odd * odd, 0) / width + eps)
    even = even * factor * tl.load(weight + 2 * columns, inside, other=0.0).to(tl.float32)
    odd = odd * factor * tl.load(weight + 2 * columns + 1, inside, other=0.0).to(tl.float32)
    if ROTATE:
        at = ((row % tokens) * pairs + columns % pairs) * 2
        cos = tl.load(rotation + at, inside, other=0.0)
        sin = tl.load(rotation + at + 1, inside, other=0.0)
        even, odd = even * cos - odd * sin, even * sin + odd * cos
    tl.store(out + row * width + 2 * columns, even.to(out.dtype.element_ty), inside)
    tl.store(out + row * width + 2 * columns + 1, odd.to(out.dtype.element_ty), inside)
    tl.store(inverse + row, factor)


@triton.jit
def rms_norm_backward(
    grad, x, weight, rotation, inverse, grad_x, sums, rows, tokens, width, pairs, ROWS: tl.constexpr,
    ROTATE: tl.constexpr, SUMS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of x, and partial sums of that of the weight. One program has `ROWS` rows."""
    part = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, HALF)
    inside = 2 * columns < width
    gain_even = tl.load(weight + 2 * columns, inside, other=0.0).to(tl.float32)
    gain_odd = tl.load(weight + 2 * columns + 1, inside, other=0.0).to(tl.float32)
    sum_even, sum_odd = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    for number in range(ROWS):
        place = part * ROWS + number
        known = inside & (place < rows)
        row = tl.minimum(place, rows - 1)
        at = row * width + 2 * columns
        even = tl.load(grad + at, known, other=0.0).to(tl.float32)
        odd = tl.load(grad + at + 1, known, other=0.0).to(tl.float32)
        if ROTATE:
            turn = ((row % tokens) * pairs + columns % pairs) * 2
            cos = tl.load(rotation + turn, inside, other=0.0)
            sin = tl.load(rotation + turn + 1, inside, other=0.0)
            even, odd = even * cos + odd * sin, odd * cos - even * sin
        factor = tl.load(inverse + row)
        normed_even = tl.load(x + at, known, other=0.0).to(tl.float32) * factor
        normed_odd = tl.load(x + at + 1, known, other=0.0).to(tl.float32) * factor
        if SUMS:
            sum_even += even * normed_even
            sum_odd += odd * normed_odd
        even, odd = even * gain_even, odd * gain_odd
        along = tl.sum(even * normed_even + odd * normed_odd, 0) / width
        tl.store(grad_x + at, ((even - normed_even * along) * factor).to(grad_x.dtype.element_ty), known)
        tl.store(grad_x + at + 1, ((odd - normed_odd * along) * factor).to(grad_x.dtype.element_ty), known)
    if SUMS:
        tl.store(sums + part * width + 2 * columns, sum_even, inside)
        tl.store(sums + part * width + 2 * columns + 1, sum_odd, inside)
