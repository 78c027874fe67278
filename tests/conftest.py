"""Test set-up: Triton's interpreter is switched on before anything imports triton; Ctrl-C works."""

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in a shell's background; processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
