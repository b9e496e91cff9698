/* The extension module ringred.native._player: plays tapes without the GIL. Its functions take numbers and addresses. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "layout.h"

PyObject *recall_class(void); /* recall.c */

static int numbers(PyObject *const *args, Py_ssize_t given, long long *out, Py_ssize_t least, Py_ssize_t most) {
    if (given < least || given > most) {
        PyErr_Format(PyExc_TypeError, "expected %zd to %zd arguments, got %zd", least, most, given);
        return 0;
    }
    for (Py_ssize_t at = 0; at < given; at++) {
        out[at] = PyLong_AsLongLong(args[at]);
        if (out[at] == -1 && PyErr_Occurred()) return 0;
    }
    return 1;
}

PyDoc_STRVAR(play_doc,
             "play(rank, tape, contract, timeout_ns, times=0, how=0) -> how it ended\n\n"
             "As in layout.h; `rank`, `tape` and `times` are addresses. Raises what a signal handler raises.");

static PyObject *module_play(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    long long in[6] = {0};
    if (!numbers(args, given, in, 4, 6)) return NULL;
    for (;;) {
        int result;
        Py_BEGIN_ALLOW_THREADS
        result = play((Rank *)in[0], (Tape *)in[1], in[2], in[3], (int64_t *)in[4], (int)in[5]);
        Py_END_ALLOW_THREADS
        if (result == NO_MEMORY) return PyErr_NoMemory();
        if (result != SIGNAL) return PyLong_FromLong(result);
        if (PyErr_CheckSignals()) return NULL;
    }
}

PyDoc_STRVAR(drop_doc, "drop(tape)\n\nForgets a tape that was not played to its end.");

static PyObject *module_drop(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    long long in[1];
    if (!numbers(args, given, in, 1, 1)) return NULL;
    drop((Tape *)in[0]);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(kernel_doc, "kernel(kind, op, level=2) -> the address of a fold, 0 if there is none");

static PyObject *module_kernel(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    long long in[3] = {0, 0, 2};
    if (!numbers(args, given, in, 2, 3)) return NULL;
    return PyLong_FromLongLong((long long)(intptr_t)fold_of((int)in[0], (int)in[1], (int)in[2]));
}

PyDoc_STRVAR(fold_doc,
             "fold(kernel, divisor, elements, out, operands...)\n\n"
             "Runs a fold on memory at these addresses; `divisor` is a number, 0 where nothing is divided.");

static PyObject *module_fold(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    enum { MOST = 64, BEFORE = 4 };
    long long in[MOST + BEFORE];
    const void *operands[MOST];
    if (!numbers(args, given, in, BEFORE + 2, BEFORE + MOST)) return NULL;
    Py_ssize_t count = given - BEFORE;
    for (Py_ssize_t at = 0; at < count; at++) operands[at] = (const void *)(intptr_t)in[BEFORE + at];
    Py_BEGIN_ALLOW_THREADS
    ((Fold)(intptr_t)in[0])((void *)(intptr_t)in[3], operands, count, in[2], (double)in[1]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(stream_doc, "stream(to, from, nbytes)\n\nCopies between addresses, past the cache.");

static PyObject *module_stream(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    long long in[3];
    if (!numbers(args, given, in, 3, 3)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    stream((char *)(intptr_t)in[0], (const char *)(intptr_t)in[1], in[2]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(fence_doc, "fence()\n\nOrders all loads and stores before it and all after it.");

static PyObject *module_fence(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(level_doc, "level() -> the highest level of folds that this processor has");

static PyObject *module_level(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromLong(level_of_processor());
}

PyDoc_STRVAR(layout_doc, "layout() -> the numbers that Python has to agree on");

static PyObject *module_layout(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    static const long numbers[] = {
        VERSION, SLEEPING, ALARM, CLOSED, EXPOSED_CONTRACT, EXPOSED_AT, ENTRIES, SMALL_BYTES, SMALL_SLOTS, SMALL_STRIDE,
        SLOT_BYTES, SLOTS, PART_BYTES, SEGMENT_BYTES, SLOT, SLOT_PART, KIND_BITS,
        sizeof(Rank) / 8, sizeof(Link) / 8, sizeof(Request) / 8,
    };
    enum { COUNT = sizeof numbers / sizeof *numbers };
    PyObject *layout = PyTuple_New(COUNT);
    for (Py_ssize_t at = 0; layout && at < COUNT; at++)
        if (PyTuple_SetItem(layout, at, PyLong_FromLong(numbers[at]))) Py_CLEAR(layout);
    return layout;
}

static PyMethodDef methods[] = {
    {"play", (PyCFunction)(void (*)(void))module_play, METH_FASTCALL, play_doc},
    {"drop", (PyCFunction)(void (*)(void))module_drop, METH_FASTCALL, drop_doc},
    {"kernel", (PyCFunction)(void (*)(void))module_kernel, METH_FASTCALL, kernel_doc},
    {"fold", (PyCFunction)(void (*)(void))module_fold, METH_FASTCALL, fold_doc},
    {"stream", (PyCFunction)(void (*)(void))module_stream, METH_FASTCALL, stream_doc},
    {"fence", module_fence, METH_NOARGS, fence_doc},
    {"level", module_level, METH_NOARGS, level_doc},
    {"layout", module_layout, METH_NOARGS, layout_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_player", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__player(void) {
    PyObject *made = PyModule_Create(&module), *recall = recall_class();
    if (!made || !recall || PyModule_AddObject(made, "Recall", recall)) {
        Py_XDECREF(recall);
        Py_CLEAR(made);
    }
#ifdef Py_GIL_DISABLED
    /* A tape has one player at a time, whoever calls, and a Recall changes in the order of calls. */
    if (made && PyUnstable_Module_SetGIL(made, Py_MOD_GIL_NOT_USED)) Py_CLEAR(made);
#endif
    return made;
}
