"""`qa-deepspeed demo`: a page on which a trained model answers questions, for a browser on this computer."""

from __future__ import annotations

import argparse
import signal
import threading

from qa_deepspeed.utils.errors import UserError

HOST = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `demo`; lengths and null threshold are those of the model's training."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or hub name of a trained model, or folder of an ONNX export")
    add("--host", default=HOST, help=f"address to listen on (default {HOST}: this computer alone; 0.0.0.0: any)")
    add("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    add("--device", help="cpu, cuda, cuda:0 ... (default: a GPU if there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C or SIGTERM; returns 0.

    Raises:
        UserError: gradio is missing, the model cannot be used, or the address cannot be listened on.
    """
    if arguments.port is not None and not 1 <= arguments.port <= 65535:
        raise UserError(f"--port {arguments.port}: pass a number from 1 to 65535")
    from qa_deepspeed.inference.answerer import QuestionAnswerer
    from qa_deepspeed.inference.demo_page import demo_page, require_gradio, serve

    gradio = require_gradio()
    answerer = QuestionAnswerer.from_pretrained(arguments.model, device=arguments.device)
    page = demo_page(gradio, answerer, arguments.model)
    address = serve(gradio, page, arguments.host, arguments.port)
    print(f"{arguments.model} answers questions at {address} (Ctrl-C ends this)", flush=True)
    if arguments.host != HOST:
        print("note: no password protects this page: everyone who can reach this address can use it", flush=True)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    page.close(verbose=False)
    return 0
