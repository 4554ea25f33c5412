"""mHC in NumPy with its gradients derived by hand, one token at a time.

Sinkhorn is differentiated division by division, as it is written in the paper.
"""

import numpy as np

from tests.oracle.hyper_connections import coefficients, sigmoid


def pre(x, fn, base, scale, gain, *, iterations, eps, transpose):
    """x [T, n, d] -> (collapsed [T, d], post [T, n], res [T, n (target), n (source)], x)."""
    options = {"iterations": iterations, "eps": eps, "transpose": transpose}
    found = [coefficients(token, fn, base, scale, gain, **options) for token in x]
    weights, post, res = (np.stack(part) for part in zip(*found, strict=True))
    return np.einsum("tn,tnd->td", weights, x), post, res, x


def sinkhorn_gradient(logits, g, iterations, eps):
    """Gradient of the logits [n, n] from g, that of sinkhorn(logits, iterations, eps)."""
    powers = np.exp(logits - logits.max())
    m, divisions = powers, []
    for i in range(iterations):
        for axis in (0, 1):
            first = i == 0 and axis == 0
            sums = m.sum(axis=axis, keepdims=True) + (0 if first else eps)
            divisions.append((m, sums, axis))
            m = m / sums + (eps if first else 0)
    for m, sums, axis in reversed(divisions):
        g = g / sums - (g * m).sum(axis=axis, keepdims=True) / sums**2
    return g * powers


def pre_gradients(x, fn, base, scale, gain, g, *, iterations, eps, transpose):
    """(dx, dfn, dbase, dscale, dgain) from g = (of collapsed, of post, of res, of x)."""
    tokens, n, d = x.shape
    dx = np.zeros_like(x)
    dfn, dbase, dscale, dgain = (np.zeros(np.shape(a)) for a in (fn, base, scale, gain))
    kinds = np.repeat([0, 1, 2], [n, n, n * n])
    for t in range(tokens):
        flat = x[t].reshape(-1)
        rms = np.sqrt((flat**2).mean() + eps)
        v = flat / rms * gain
        h = v @ fn
        z = scale[kinds] * h + base
        s_pre, s_post = sigmoid(z[:n]), sigmoid(z[n : 2 * n])
        logits = z[2 * n :].reshape(n, n)

        g_collapsed, g_post, g_res, g_x = (part[t] for part in g)
        d_logits = sinkhorn_gradient(logits.T if transpose else logits, g_res, iterations, eps)
        dz = np.concatenate(
            [
                x[t] @ g_collapsed * s_pre * (1 - s_pre),
                2 * g_post * s_post * (1 - s_post),
                (d_logits.T if transpose else d_logits).reshape(-1),
            ]
        )
        dbase += dz
        np.add.at(dscale, kinds, dz * h)
        dh = scale[kinds] * dz
        dfn += np.outer(v, dh)
        dv = fn @ dh
        dgain += dv * flat / rms
        d_normed = dv * gain
        d_flat = d_normed / rms - flat * (d_normed @ flat) / (len(flat) * rms**3)
        dx[t] = d_flat.reshape(n, d) + np.outer(s_pre + eps, g_collapsed) + g_x
    return dx, dfn, dbase, dscale, dgain


def merge(x, y, post, res):
    """x [T, n, d], y [T, d] -> [T, n, d]."""
    return np.einsum("tij,tjd->tid", res, x) + post[:, :, None] * y[:, None]


def merge_gradients(x, y, post, res, g):
    """(dx, dy, dpost, dres)."""
    return (
        np.einsum("tij,tid->tjd", res, g),
        np.einsum("ti,tid->td", post, g),
        np.einsum("tid,td->ti", g, y),
        np.einsum("tid,tjd->tij", g, x),
    )
