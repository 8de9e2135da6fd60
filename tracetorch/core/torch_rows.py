"""The rows of torch's own modules in the table of a network file."""

from __future__ import annotations

from torch import nn

from tracetorch.core.rows import BOOL, FLOAT, INT, SHAPE, Argument, Row, either, one_of, one_or_each, or_none, tuple_of


def _of_dimensions(n: int) -> dict[str, dict[str, Argument]]:
    """Those that there are for 1, 2 and 3 dimensions."""
    rows: dict[str, dict[str, Argument]] = {}
    size, size_or_none, tuple_n = one_or_each(INT, n), or_none(one_or_each(INT, n)), tuple_of(INT, n)
    conv = {
        "in_channels": INT,
        "out_channels": INT,
        "kernel_size": tuple_n,
        "stride": tuple_n,
        "dilation": tuple_n,
        "groups": INT,
        "padding_mode": one_of("zeros", "reflect", "replicate", "circular"),
    }
    rows[f"Conv{n}d"] = {**conv, "padding": either(one_of("same", "valid"), tuple_n)}
    rows[f"ConvTranspose{n}d"] = {**conv, "padding": tuple_n, "output_padding": tuple_n}
    pool = {"kernel_size": size, "stride": size_or_none, "padding": size, "ceil_mode": BOOL}
    rows[f"MaxPool{n}d"] = {**pool, "dilation": size, "return_indices": BOOL}
    divisor = {"divisor_override": or_none(INT)} if n > 1 else {}
    rows[f"AvgPool{n}d"] = {**pool, "count_include_pad": BOOL, **divisor}
    adaptive = or_none(one_or_each(or_none(INT), n))
    rows[f"AdaptiveAvgPool{n}d"] = {"output_size": adaptive}
    rows[f"AdaptiveMaxPool{n}d"] = {"output_size": adaptive, "return_indices": BOOL}
    rows[f"LPPool{n}d"] = {"norm_type": FLOAT, "kernel_size": size, "stride": size_or_none, "ceil_mode": BOOL}
    rows[f"Dropout{n}d"] = {"p": FLOAT, "inplace": BOOL}
    norm = {"num_features": INT, "eps": FLOAT, "momentum": or_none(FLOAT), "affine": BOOL}
    rows[f"BatchNorm{n}d"] = rows[f"InstanceNorm{n}d"] = {**norm, "track_running_stats": BOOL}
    rows[f"ZeroPad{n}d"] = {"padding": tuple_of(INT, 2 * n)}
    return rows


def torch_rows() -> dict[str, Row]:
    """`torch.nn.Linear` -> its row, and so on."""
    rows = {name: fields for n in (1, 2, 3) for name, fields in _of_dimensions(n).items()}
    inplace = {"inplace": BOOL}
    for name in ("ReLU", "ReLU6", "SELU", "SiLU", "Mish", "Hardswish", "Hardsigmoid"):
        rows[name] = inplace
    for name in ("Identity", "Sigmoid", "Tanh", "Softsign", "LogSigmoid"):
        rows[name] = {}
    for name in ("Dropout", "AlphaDropout", "FeatureAlphaDropout"):
        rows[name] = {"p": FLOAT, **inplace}
    rows |= {
        "Linear": {"in_features": INT, "out_features": INT},
        "Flatten": {"start_dim": INT, "end_dim": INT},
        "Unflatten": {"dim": INT, "unflattened_size": SHAPE},
        "LeakyReLU": {"negative_slope": FLOAT, **inplace},
        "ELU": {"alpha": FLOAT, **inplace},
        "CELU": {"alpha": FLOAT, **inplace},
        "Hardtanh": {"min_val": FLOAT, "max_val": FLOAT, **inplace},
        "PReLU": {"num_parameters": INT, "init": FLOAT},
        "GELU": {"approximate": one_of("none", "tanh")},
        "Softplus": {"beta": FLOAT, "threshold": FLOAT},
        "Softmax": {"dim": or_none(INT)},
        "LogSoftmax": {"dim": or_none(INT)},
        "LayerNorm": {"normalized_shape": SHAPE, "eps": FLOAT, "elementwise_affine": BOOL},
        "GroupNorm": {"num_groups": INT, "num_channels": INT, "eps": FLOAT, "affine": BOOL},
        "Upsample": {
            "size": or_none(either(INT, tuple_of(INT, 1, 2, 3))),
            "scale_factor": or_none(either(FLOAT, tuple_of(FLOAT, 1, 2, 3))),
            "mode": one_of("nearest", "linear", "bilinear", "bicubic", "trilinear", "nearest-exact", "area"),
            "align_corners": or_none(BOOL),
            "recompute_scale_factor": or_none(BOOL),
        },
    }
    return {f"torch.nn.{name}": Row(getattr(nn, name), fields) for name, fields in rows.items()}
