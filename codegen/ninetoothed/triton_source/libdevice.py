"""Compiling without libdevice what calls no more of it than one function, which stands here.

Triton reads and links the whole library for each kernel, which takes as long as the rest of compiling a small one. The
function has the blocks that libdevice's has, so that the machine code is the same; Triton sets the flag.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

RSQRT = """
@name = private unnamed_addr constant [11 x i8] c"__CUDA_FTZ\\00"
declare i32 @__nvvm_reflect(ptr)
declare float @llvm.nvvm.rsqrt.approx.ftz.f(float)
declare float @llvm.nvvm.rsqrt.approx.f(float)

define float @__nv_rsqrtf(float %x) alwaysinline nounwind {
  %flag = call i32 @__nvvm_reflect(ptr @name)
  %flushes = icmp ne i32 %flag, 0
  br i1 %flushes, label %flush, label %keep
flush:
  %flushed = call float @llvm.nvvm.rsqrt.approx.ftz.f(float %x)
  br label %done
keep:
  %kept = call float @llvm.nvvm.rsqrt.approx.f(float %x)
  br label %done
done:
  %y = phi float [ %flushed, %flush ], [ %kept, %keep ]
  ret float %y
}
"""
# What Triton computes itself, of float32 and less: whatever else a source names may be libdevice's.
PLAIN = frozenset(
    {"load", "store", "arange", "full", "program_id", "extra.cuda.gdc_wait", "extra.cuda.gdc_launch_dependents"}
    | {"cast", "int1", "int32", "int64", "float16", "bfloat16", "float32"}
    | {"where", "maximum", "minimum", "PropagateNan.ALL", "exp", "exp2", "sum", "max", "dot", "trans", "reshape"}
)


def without(source: str, folder: Path) -> dict[str, Any]:
    """Triton's options for a generated `source` to be compiled without the library; none where it may need that.

    Args:
        folder: where the function is written, for Triton to read.
    """
    names = set(re.findall(r"triton\.language\.([\w.]+)", source))
    if "rsqrt" not in names or not names <= PLAIN | {"rsqrt"}:
        return {}  # what calls nothing of it does without anyhow
    path = folder / "libdevice.ll"
    path.write_text(RSQRT, encoding="utf-8")
    return {"extern_libs": {"libdevice": str(path)}}
