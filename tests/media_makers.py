"""Tiny sounds and films, encoded by PyAV."""

import io
from fractions import Fraction

import av
import numpy as np


def wav_bytes(seconds: float = 0.1, rate: int = 8000, channels: int = 2) -> bytes:
    """A WAV file: the left channel at 0.5, the others silent."""
    buffer = io.BytesIO()
    samples = np.zeros((1, int(rate * seconds) * channels), np.int16)
    samples[0, ::channels] = 1 << 14
    with av.open(buffer, "w", format="wav") as container:
        layout = "stereo" if channels == 2 else "mono"
        stream = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout)
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def video_bytes(frames: int = 6, rate: int = 4, brightness_step: int = 40) -> bytes:
    """An MP4 file of 32 x 16 pixels: frame i has the grey value i * brightness_step."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(frames):
            grey = np.full((16, 32, 3), min(255, number * brightness_step), np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
