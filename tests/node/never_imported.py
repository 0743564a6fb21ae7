"""An entry whose import takes for ever, as on a disk that does not answer."""

import threading

threading.Event().wait()
