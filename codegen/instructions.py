"""Functions that are one instruction: Triton calls libdevice for them, and linking that takes as long as compiling the
rest of a small kernel. The instruction is the one that libdevice comes to. Imports neither the package nor torch (see
`aot_worker`).
"""

from __future__ import annotations

import ast

FLOAT32 = {"rsqrt": "rsqrt.approx.ftz.f32 $0, $1;"}  # of PTX


class _Instructions(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Attribute(attr=name), args=[argument]) if name in FLOAT32:
                made = ast.parse(
                    f"triton.language.inline_asm_elementwise({FLOAT32[name]!r}, '=f,f', [], "
                    "dtype=triton.language.float32, is_pure=True, pack=1)",
                    mode="eval",
                ).body
                assert isinstance(made, ast.Call)
                assert isinstance(made.args[2], ast.List)
                made.args[2].elts.append(argument)
                return made
        return node


def use_instructions(tree: ast.Module) -> None:
    """Replace the functions of a module that ninetoothed generated, in which nothing is float64, in place."""
    kernel = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    _Instructions().visit(kernel)
