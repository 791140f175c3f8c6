"""The state-space recurrence and the causal convolution in float64 numpy, token by token: the yardstick."""

import numpy as np


def places(lengths, start=0, end=0):
    """int32 segments of one row: documents of these lengths, with `start` and `end` slots of padding around them."""
    documents = [np.full(length, number) for number, length in enumerate(lengths, 1)]
    return np.concatenate([np.zeros(start), *documents, np.zeros(end)]).astype(np.int32)


def ssd(x, dt, a, b, c, segments, state=None, segment=None):
    """y [B, T, N, P], last states [B, N, P, Z] and the segment of each row's last real token."""
    B, T, N, P = x.shape
    heads, Z = N // b.shape[2], b.shape[3]
    y, last, ids = np.zeros(x.shape), np.zeros((B, N, P, Z)), np.zeros(B, np.int32)
    if state is not None:
        last, ids = np.array(state, np.float64), np.array(segment)
    for row in range(B):
        for t in range(T):
            if segments[row, t] == 0:
                continue
            for n in range(N):
                h = last[row, n] if segments[row, t] == ids[row] else np.zeros((P, Z))
                h = np.exp(dt[row, t, n] * a[n]) * h + dt[row, t, n] * np.outer(x[row, t, n], b[row, t, n // heads])
                last[row, n] = h
                y[row, t, n] = h @ c[row, t, n // heads]
            ids[row] = segments[row, t]
    return y, last, ids


def ssd_gradients(x, dt, a, b, c, segments, dy, dlast):
    """Gradients (dx, ddt, da, db, dc) of sum(y * dy) + sum(last * dlast), from states of 0, backwards through time."""
    heads = x.shape[2] // b.shape[2]
    grads = dx, ddt, da, db, dc = tuple(np.zeros(v.shape) for v in (x, dt, a, b, c))
    for row in range(len(x)):
        tokens = np.flatnonzero(segments[row])
        for n in range(x.shape[2]):
            g, h, before = n // heads, np.zeros(dlast.shape[2:]), {}
            for t, earlier in zip(tokens, [None, *tokens], strict=False):
                fresh = earlier is None or segments[row, earlier] != segments[row, t]
                before[t] = np.zeros_like(h) if fresh else h
                h = np.exp(dt[row, t, n] * a[n]) * before[t] + dt[row, t, n] * np.outer(x[row, t, n], b[row, t, g])
                before[t] = before[t], fresh, h
            dh = dlast[row, n]
            for t in tokens[::-1]:
                h_before, fresh, h = before[t]
                step, decay = dt[row, t, n], np.exp(dt[row, t, n] * a[n])
                dc[row, t, g] += dy[row, t, n] @ h
                dh = dh + np.outer(dy[row, t, n], c[row, t, g])
                slope = np.sum(dh * decay * h_before)
                dx[row, t, n] = step * dh @ b[row, t, g]
                db[row, t, g] += step * x[row, t, n] @ dh
                ddt[row, t, n] = slope * a[n] + x[row, t, n] @ dh @ b[row, t, g]
                da[n] += slope * step
                dh = np.zeros_like(dh) if fresh else decay * dh
    return grads


def causal_conv(x, kernel, bias, segments):
    """y [B, T, C] of every token over the last inputs of its segment."""
    y = np.zeros(x.shape)
    width = kernel.shape[1]
    for row in range(len(x)):
        for t in np.flatnonzero(segments[row]):
            y[row, t] = bias
            own = [s for s in range(t + 1) if segments[row, s] == segments[row, t]][-width:]
            for back, s in enumerate(reversed(own), 1):
                y[row, t] += kernel[:, -back] * x[row, s]
    return y


def causal_conv_gradients(x, kernel, segments, dy):
    """Gradients (dx, dkernel, dbias) of sum(y * dy)."""
    dx, dkernel, dbias = np.zeros(x.shape), np.zeros(kernel.shape), np.zeros(len(kernel))
    for row in range(len(x)):
        for t in np.flatnonzero(segments[row]):
            dbias += dy[row, t]
            own = [s for s in range(t + 1) if segments[row, s] == segments[row, t]][-kernel.shape[1] :]
            for back, s in enumerate(reversed(own), 1):
                dx[row, s] += kernel[:, -back] * dy[row, t]
                dkernel[:, -back] += x[row, s] * dy[row, t]
    return dx, dkernel, dbias
