"""Runs compiled kernels without a GPU: the PTX that Triton emits for NVIDIA targets, executed by our own code in numpy.

    python -m tests.ptx [--target sm_90] [--errors exact|random|up|down] [-k WORDS]    the kernels' tests, compiled

`driver` takes the place of Triton's driver, so that a launch on CPU tensors goes the whole way of one on a GPU, from
the arguments' classes over compilation to the launch's signature, and then runs here: `parser` reads the text,
`opcodes` says what each instruction does (`arithmetic`, how it rounds), `machine` runs all threads of all programs,
`memory` is what they load from and store to. `planted` are faults to catch.

What is checked on the way: bounds and alignment of every access, races of programs and of warps between barriers, whole
warps at shuffles, barriers that some threads never reach, division by zero, arguments that do not fit their parameters.
A register that is read before it is written holds junk. An instruction that is not in the table is an error that names
it.

What it says nothing about: ptxas and the machine code that it makes, speed, registers and spills (`python -m bench
compile` reads those), the true error of the special-function unit (only its documented bound), and kernels that use
tensor cores or bulk copies.
"""
