"""DashAttention in Triton. docs/internals.md has the order of the kernels and a glossary."""
