# mypy: ignore-errors
# Kernels are written in Triton's language, which only looks like Python.
"""GPU kernels of batch norm with what follows it: every pass over the activations is one of the fewest there can be.

An activation is a row-major (M, C) matrix: M = batch x height x width rows (channels last), C channels. Sums over the
rows are formed in float32, in a fixed order: results do not depend on the order in which programs run.
"""

import triton
import triton.language as tl

__all__ = [
    "column_sums",
    "gradient_columns",
    "gradient_of_input",
    "normalise_rows",
    "running_statistics",
    "statistics",
    "totals",
]


@triton.jit
def _places(row, channel, last_row, channels):
    """Offsets and which of them exist."""
    place = row[:, None].to(tl.int64) * channels + channel[None, :]
    return place, (row[:, None] < last_row) & (channel[None, :] < channels)


@triton.jit
def _column(start, channel, channels):
    """Numbers of the channels, float32."""
    return tl.load(start + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _mean_and_gain(found, weight, channel, channels):
    """Mean, and weight / deviation."""
    gain = _column(found + channels, channel, channels) * _column(weight, channel, channels)
    return _column(found, channel, channels), gain


@triton.jit
def _total(partial, channel, parts, channels, tile_parts: tl.constexpr, tile_channels: tl.constexpr):
    """Sums of partial[p, channel] over all parts p; with few parts all of them are read at once."""
    sums = tl.zeros((tile_parts, tile_channels), tl.float32)
    for start in range(0, parts, tile_parts):
        place, inside = _places(start + tl.arange(0, tile_parts), channel, parts, channels)
        sums += tl.load(partial + place, mask=inside, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def totals(partial, sums, parts, channels, tile_parts: tl.constexpr, tile_channels: tl.constexpr):
    """sums[k, c] = sum over p of partial[k, p, c]."""
    channel = tl.program_id(0) * tile_channels + tl.arange(0, tile_channels)
    kind = tl.program_id(1)
    total = _total(partial + kind * parts * channels, channel, parts, channels, tile_parts, tile_channels)
    tl.store(sums + kind * channels + channel, total, mask=channel < channels)


@triton.jit
def column_sums(
    x, partial, num_rows, channels, tile_rows: tl.constexpr, tile_channels: tl.constexpr, stages: tl.constexpr
):  # fmt: skip
    """partial[0, p, c] = sum of x - shift, partial[1, p, c] of its square, over the tiles p, p + P, p + 2 P ...

    The shift is the first row: near to the mean, so that the square of the mean does not swallow the variance.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * tile_channels + tl.arange(0, tile_channels)
    shift = _column(x, channel, channels)
    sums = tl.zeros((tile_rows, tile_channels), tl.float32)
    squares = tl.zeros((tile_rows, tile_channels), tl.float32)
    for start in tl.range(part * tile_rows, num_rows, parts * tile_rows, num_stages=stages):
        place, inside = _places(start + tl.arange(0, tile_rows), channel, num_rows, channels)
        centred = tl.where(inside, tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - shift, 0.0)
        sums += centred
        squares += centred * centred
    place = part * channels + channel
    tl.store(partial + place, tl.sum(sums, 0), mask=channel < channels)
    tl.store(partial + parts * channels + place, tl.sum(squares, 0), mask=channel < channels)


@triton.jit
def statistics(
    x, partial, found, running_mean, running_var, seen, num_rows, channels, parts, eps, momentum,
    tile_parts: tl.constexpr, tile_channels: tl.constexpr, is_recorded: tl.constexpr,
):  # fmt: skip
    """found[0] = mean, found[1] = 1 / sqrt(variance + eps) from `column_sums`; running statistics move along."""
    channel = tl.program_id(0) * tile_channels + tl.arange(0, tile_channels)
    sums = _total(partial, channel, parts, channels, tile_parts, tile_channels)
    squares = _total(partial + parts * channels, channel, parts, channels, tile_parts, tile_channels)
    exists = channel < channels
    offset = sums / num_rows
    variance = tl.maximum(squares / num_rows - offset * offset, 0.0)
    mean = tl.load(x + channel, mask=exists, other=0.0).to(tl.float32) + offset
    tl.store(found + channel, mean, mask=exists)
    tl.store(found + channels + channel, 1.0 / tl.sqrt(variance + eps), mask=exists)
    if is_recorded:
        unbiased = variance * (num_rows / (num_rows - 1.0))
        before = tl.load(running_mean + channel, mask=exists, other=0.0)
        tl.store(running_mean + channel, before + momentum * (mean - before), mask=exists)
        before = tl.load(running_var + channel, mask=exists, other=0.0)
        tl.store(running_var + channel, before + momentum * (unbiased - before), mask=exists)
        if tl.program_id(0) == 0:
            tl.store(seen, tl.load(seen) + 1)


@triton.jit
def running_statistics(
    running_mean, running_var, found, channels, eps, tile_channels: tl.constexpr
):  # fmt: skip
    """found[0] = mean, found[1] = 1 / sqrt(variance + eps) of the running averages."""
    channel = tl.program_id(0) * tile_channels + tl.arange(0, tile_channels)
    exists = channel < channels
    variance = tl.load(running_var + channel, mask=exists, other=0.0)
    tl.store(found + channel, tl.load(running_mean + channel, mask=exists, other=0.0), mask=exists)
    tl.store(found + channels + channel, 1.0 / tl.sqrt(variance + eps), mask=exists)


@triton.jit
def _tile_from_the_end(num_rows, channels, tile_rows: tl.constexpr, tile_channels: tl.constexpr):
    """Rows and channels of a program's tile; the first programs take the last rows.

    Those were read last by the sums in front of this pass: what of them is left in the cache is used before it goes.
    """
    across = tl.cdiv(channels, tile_channels)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = program // across * tile_rows + tl.arange(0, tile_rows)
    return row, program % across * tile_channels + tl.arange(0, tile_channels)


@triton.jit
def normalise_rows(
    x, found, weight, bias, slope, residual, y, num_rows, channels,
    tile_rows: tl.constexpr, tile_channels: tl.constexpr, has_slope: tl.constexpr, has_residual: tl.constexpr,
):  # fmt: skip
    """Write prelu(weight (x - mean) / deviation + bias) + residual."""
    row, channel = _tile_from_the_end(num_rows, channels, tile_rows, tile_channels)
    place, inside = _places(row, channel, num_rows, channels)
    mean, gain = _mean_and_gain(found, weight, channel, channels)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value = (value - mean) * gain + _column(bias, channel, channels)
    if has_slope:
        value = tl.where(value > 0, value, value * _column(slope, channel, channels))
    if has_residual:
        value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _through_prelu(gradient, centred, gain, offset, steepness):
    """The gradient in front of the PReLU, and that of the slopes before it is summed."""
    value = centred * gain + offset
    is_bent = value <= 0
    return tl.where(is_bent, gradient * steepness, gradient), tl.where(is_bent, gradient * value, 0.0)


@triton.jit
def gradient_columns(
    gradient, x, found, weight, bias, slope, partial, num_rows, channels, tile_rows: tl.constexpr,
    tile_channels: tl.constexpr, stages: tl.constexpr, has_slope: tl.constexpr, wants_slope: tl.constexpr,
):  # fmt: skip
    """partial[k, p, c]: gradients of bias, weight and, if wanted, slope (k = 0, 1, 2), summed over the tiles of p."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * tile_channels + tl.arange(0, tile_channels)
    mean, gain = _mean_and_gain(found, weight, channel, channels)
    offset, steepness = _column(bias, channel, channels), _column(slope, channel, channels)
    of_bias = tl.zeros((tile_rows, tile_channels), tl.float32)
    of_gain = tl.zeros((tile_rows, tile_channels), tl.float32)
    of_slope = tl.zeros((tile_rows, tile_channels), tl.float32)
    for start in tl.range(part * tile_rows, num_rows, parts * tile_rows, num_stages=stages):
        place, inside = _places(start + tl.arange(0, tile_rows), channel, num_rows, channels)
        upstream = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)  # zero outside: adds nothing
        centred = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean
        if has_slope:
            upstream, bent = _through_prelu(upstream, centred, gain, offset, steepness)
            if wants_slope:
                of_slope += bent
        of_bias += upstream
        of_gain += upstream * centred
    exists = channel < channels
    place = part * channels + channel
    inverse = tl.load(found + channels + channel, mask=exists, other=0.0)
    tl.store(partial + place, tl.sum(of_bias, 0), mask=exists)
    tl.store(partial + parts * channels + place, tl.sum(of_gain, 0) * inverse, mask=exists)
    if wants_slope:
        tl.store(partial + 2 * parts * channels + place, tl.sum(of_slope, 0), mask=exists)


@triton.jit
def gradient_of_input(
    gradient, x, found, weight, bias, slope, sums, of_skip, result, num_rows, channels, tile_rows: tl.constexpr,
    tile_channels: tl.constexpr, has_slope: tl.constexpr, has_skip: tl.constexpr, is_frozen: tl.constexpr,
):  # fmt: skip
    """Write weight / deviation (g - mean(g) - unit mean(g unit)) + of_skip.

    g is the gradient in front of the PReLU, unit = (x - mean) / deviation. Running averages do not depend on x: with
    them (`is_frozen`) both means are absent.
    """
    row, channel = _tile_from_the_end(num_rows, channels, tile_rows, tile_channels)
    place, inside = _places(row, channel, num_rows, channels)
    mean, gain = _mean_and_gain(found, weight, channel, channels)
    upstream = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    if has_slope or not is_frozen:
        centred = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean
    if has_slope:
        offset, steepness = _column(bias, channel, channels), _column(slope, channel, channels)
        upstream, _ = _through_prelu(upstream, centred, gain, offset, steepness)
    if not is_frozen:
        mean_gradient = _column(sums, channel, channels) / num_rows
        tilt = _column(sums + channels, channel, channels) * _column(found + channels, channel, channels) / num_rows
        upstream = upstream - mean_gradient - centred * tilt
    value = gain * upstream
    if has_skip:
        value += tl.load(of_skip + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + place, value.to(result.dtype.element_ty), mask=inside)
