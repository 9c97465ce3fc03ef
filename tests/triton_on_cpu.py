"""Triton's interpreter, without the three gaps that keep it from running Liger's kernels: it leaves a float what it is
in Python, which then has no `.to`, and libdevice's `rsqrt` and `tanh` are stubs that give nothing."""

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter


def close_gaps() -> None:
    """Pass floats to kernels in float32, as Triton's launcher does on a GPU, and take rsqrt and tanh from tl."""
    convert = interpreter._implicit_cvt

    def with_floats(argument):
        if not isinstance(argument, float):
            return convert(argument)
        dtype = tl.str_to_ty("fp32", None)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), dtype), dtype)

    interpreter._implicit_cvt = with_floats
    import liger_kernel.ops.geglu as geglu
    import liger_kernel.ops.rms_norm as rms_norm

    rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)  # looked up late: the interpreter replaces it while a kernel runs
    geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
