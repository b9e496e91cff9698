/* The class ringred.native._player.Recall: finds a call that was made before by its arguments, and plays its tape again,
 * without Python. What it does not know, and all that has to wait for long or goes wrong, it leaves to Python. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "layout.h"
PyObject *recall_class(void);

enum { KEY_WORDS = 32, PLACES = 256, TRIES = 4 };

/* All that a call depends on: of a tensor its address, length and dtype, of anything else which object it is. */
typedef struct {
    int64_t length, words[KEY_WORDS];
} Key;

typedef struct {
    Key key;
    PyObject *prepared, *others; /* the call, and its tape and the objects of the key, which stay as long as this */
    Tape *tape;
    int64_t *number; /* of the last such call */
    int64_t digest;
    int left; /* this rank may be done before the others have begun */
} Known;

/* What a Recall holds: whose the rank's state is, the order's methods, the class of plain tensors, what Python does when
 * a call did not end at once, or has to be noted, and the call that was recalled last. */
enum { PLAYER, ACQUIRE, RELEASE, TENSOR, RESUME, NOTE, LAST, HELD };

typedef struct {
    PyObject_HEAD
    Rank *rank;
    PyObject *held[HELD];
    unsigned long long stride;
    long long number, recalled, timeout_ns;
    char armed, one_way;
    Known *table[PLACES];
} Recall;

static PyObject *is_cpu, *is_contiguous, *is_conj, *is_neg, *data_ptr, *numel, *dtype; /* names */

/* ---------------------------------------------------------------- keys */

static int add_word(Key *key, int64_t word) {
    if (key->length == KEY_WORDS) return 0;
    key->words[key->length++] = word;
    return 1;
}

static int method_says(PyObject *tensor, PyObject *name, PyObject *expected) {
    PyObject *got = PyObject_CallMethodObjArgs(tensor, name, NULL);
    Py_XDECREF(got);
    return got == expected;
}

static int add_attribute(Key *key, PyObject *tensor, PyObject *name, PyObject *expected) {
    PyObject *got = PyObject_GetAttr(tensor, name);
    Py_XDECREF(got);
    return expected ? got == expected : got && add_word(key, (int64_t)got);
}

static int add_number(Key *key, PyObject *tensor, PyObject *name) {
    PyObject *got = PyObject_CallMethodObjArgs(tensor, name, NULL);
    if (!got) return 0;
    long long number = PyLong_AsLongLong(got);
    Py_DECREF(got);
    return add_word(key, number);
}

/* As tensors.identity: where it is plain memory, which these words describe fully. Memory that has no address, of a sparse
 * tensor, raises. */
static int add_tensor(Key *key, PyObject *tensor) {
    return add_number(key, tensor, data_ptr) && add_number(key, tensor, numel) && add_attribute(key, tensor, dtype, NULL)
           && add_attribute(key, tensor, is_cpu, Py_True) && method_says(tensor, is_contiguous, Py_True)
           && method_says(tensor, is_conj, Py_False) && method_says(tensor, is_neg, Py_False);
}

static int add(Recall *self, Key *key, PyObject *one, PyObject *others) {
    if ((PyObject *)Py_TYPE(one) == self->held[TENSOR]) return add_tensor(key, one);
    if (!PyList_CheckExact(one) && !PyTuple_CheckExact(one))
        return add_word(key, (int64_t)one) && (!others || PyList_Append(others, one) == 0);
    Py_ssize_t length = PySequence_Size(one);
    if (!add_word(key, length)) return 0;
    for (Py_ssize_t at = 0; at < length; at++) {
        PyObject *item = PySequence_GetItem(one, at);
        int added = item && add(self, key, item, others);
        Py_XDECREF(item);
        if (!added) return 0;
    }
    return 1;
}

/* Whether these arguments can be recalled at all; the objects among them get into `others`. */
static int key_of(Recall *self, Key *key, PyObject *const *args, Py_ssize_t given, PyObject *others) {
    key->length = 0;
    for (Py_ssize_t at = 0; at < given; at++)
        if (!add(self, key, args[at], others)) {
            PyErr_Clear();
            return 0;
        }
    return 1;
}

static int is_of(const Known *known, const Key *key) {
    return known && known->key.length == key->length
           && !memcmp(known->key.words, key->words, 8 * (size_t)key->length);
}

/* Where a key is in the table, or where it may be put. */
static Known **place_of(Recall *self, const Key *key) {
    uint64_t hash = 0;
    for (int64_t at = 0; at < key->length; at++) {
        hash = (hash ^ (uint64_t)key->words[at]) * UINT64_C(0x9E3779B97F4A7C15);
        hash ^= hash >> 32;
    }
    for (uint64_t tries = 0; tries < TRIES; tries++) {
        Known **place = self->table + (hash + tries) % PLACES;
        if (!*place || is_of(*place, key)) return place;
    }
    return self->table + hash % PLACES;
}

static void let_go(Known **place) {
    Known *known = *place;
    *place = NULL;
    if (!known) return;
    Py_XDECREF(known->prepared);
    Py_XDECREF(known->others);
    PyMem_Free(known);
}

/* ---------------------------------------------------------------- calls */

static int called(PyObject *what) {
    PyObject *result = PyObject_CallNoArgs(what);
    Py_XDECREF(result);
    return result != NULL;
}

/* Gives the order back, whatever `result` is, and returns it. */
static PyObject *released(Recall *self, PyObject *result) {
    if (result) {
        if (called(self->held[RELEASE])) return result;
        Py_DECREF(result);
        return NULL;
    }
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (!called(self->held[RELEASE])) PyErr_WriteUnraisable(self->held[RELEASE]);
    PyErr_Restore(type, value, traceback);
    return NULL;
}

static PyObject *again(Recall *self, Known *known) {
    PyObject *prepared = known->prepared, *after = known->left || self->one_way ? self->held[NOTE] : NULL;
    long long number = ++*known->number;
    int64_t contract = (int64_t)(((uint64_t)known->digest + (uint64_t)number * self->stride) & (NOWHERE - 1));
    int ended;
    Py_BEGIN_ALLOW_THREADS
    ended = play(self->rank, known->tape, contract, self->timeout_ns, 0, BRIEFLY);
    Py_END_ALLOW_THREADS
    self->recalled = number;
    PyObject *before = self->held[LAST];
    Py_INCREF(prepared);
    self->held[LAST] = prepared;
    Py_XDECREF(before);
    if (ended != DONE) {
        self->armed = 0;
        after = self->held[RESUME];
    }
    PyObject *said = after ? PyObject_CallFunction(after, "OL", prepared, number) : NULL;
    if (after && !said) return NULL;
    Py_XDECREF(said);
    Py_RETURN_TRUE;
}

PyDoc_STRVAR(recall_play_doc,
             "play(prepare, *arguments) -> whether it was done\n\n"
             "Plays the call that was kept for these, if it is armed; raises what `resume` raises.");

static PyObject *recall_play(Recall *self, PyObject *const *args, Py_ssize_t given) {
    if (!self->armed) Py_RETURN_FALSE;
    if (!called(self->held[ACQUIRE])) return NULL;
    Key key;
    Known *known = self->armed && key_of(self, &key, args, given, NULL) ? *place_of(self, &key) : NULL;
    if (is_of(known, &key)) return released(self, again(self, known));
    Py_INCREF(Py_False);
    return released(self, Py_False);
}

PyDoc_STRVAR(recall_keep_doc,
             "keep(prepared, tape, address, digest, number, left, prepare, *arguments)\n\n"
             "Keeps a call for `play`. `address` is that of `tape`, `number` that of the number of the last such call, 0 for\n"
             "a collective; `left` says that this rank may be done before the others have begun.");

static PyObject *recall_keep(Recall *self, PyObject *const *args, Py_ssize_t given) {
    enum { NUMBERS = 4, BEFORE = 2 + NUMBERS };
    long long in[NUMBERS];
    if (given < BEFORE) return PyErr_Format(PyExc_TypeError, "expected %d arguments or more, got %zd", BEFORE, given);
    for (int at = 0; at < NUMBERS; at++) {
        in[at] = PyLong_AsLongLong(args[2 + at]);
        if (in[at] == -1 && PyErr_Occurred()) return NULL;
    }
    Known *known = PyMem_Calloc(1, sizeof(Known));
    if (!known) return PyErr_NoMemory();
    Py_INCREF(args[0]);
    *known = (Known){.prepared = args[0], .others = PyList_New(0), .tape = (Tape *)in[0], .digest = in[1], .left = (int)in[3]};
    known->number = in[2] ? (int64_t *)in[2] : (int64_t *)&self->number;
    if (!known->others || PyList_Append(known->others, args[1]) || !called(self->held[ACQUIRE])) {
        let_go(&known);
        return NULL;
    }
    if (key_of(self, &known->key, args + BEFORE, given - BEFORE, known->others)) {
        Known **place = place_of(self, &known->key), *before = *place;
        *place = known;
        known = before;
    }
    let_go(&known);
    Py_INCREF(Py_None);
    return released(self, Py_None);
}

PyDoc_STRVAR(recall_forget_doc, "forget()\n\nForgets all calls.");

static PyObject *recall_forget(Recall *self, PyObject *unused) {
    (void)unused;
    if (!called(self->held[ACQUIRE])) return NULL;
    for (int at = 0; at < PLACES; at++) let_go(self->table + at);
    Py_INCREF(Py_None);
    return released(self, Py_None);
}

/* ---------------------------------------------------------------- the class */

static int recall_traverse(Recall *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    for (int at = 0; at < HELD; at++) Py_VISIT(self->held[at]);
    for (int at = 0; at < PLACES; at++) {
        Known *known = self->table[at];
        if (!known) continue;
        Py_VISIT(known->prepared);
        Py_VISIT(known->others);
    }
    return 0;
}

static int recall_clear(Recall *self) {
    self->armed = 0;
    for (int at = 0; at < HELD; at++) Py_CLEAR(self->held[at]);
    for (int at = 0; at < PLACES; at++) let_go(self->table + at);
    return 0;
}

static void recall_dealloc(Recall *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    recall_clear(self);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyObject *recall_new(PyTypeObject *type, PyObject *args, PyObject *named) {
    (void)named;
    long long rank;
    unsigned long long stride;
    PyObject *held[HELD] = {NULL};
    if (!PyArg_ParseTuple(args, "OLOOOOOK", held + PLAYER, &rank, held + ACQUIRE, held + RELEASE, held + TENSOR,
                          held + RESUME, held + NOTE, &stride))
        return NULL;
    Recall *self = (Recall *)PyType_GenericAlloc(type, 0);
    if (!self) return NULL;
    memcpy(self->held, held, sizeof held);
    for (int at = 0; at < LAST; at++) Py_INCREF(held[at]);
    self->rank = (Rank *)rank, self->stride = stride;
    return (PyObject *)self;
}

static PyMethodDef recall_methods[] = {
    {"play", (PyCFunction)(void (*)(void))recall_play, METH_FASTCALL, recall_play_doc},
    {"keep", (PyCFunction)(void (*)(void))recall_keep, METH_FASTCALL, recall_keep_doc},
    {"forget", (PyCFunction)(void (*)(void))recall_forget, METH_NOARGS, recall_forget_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef recall_members[] = {
    {"armed", T_BOOL, offsetof(Recall, armed), 0, "Whether calls are played here; Python makes it true."},
    {"one_way", T_BOOL, offsetof(Recall, one_way), 0, "Whether Python is told of each call by `note`."},
    {"number", T_LONGLONG, offsetof(Recall, number), 0, "The number of the last collective."},
    {"recalled", T_LONGLONG, offsetof(Recall, recalled), 0, "The number of the last call that was played here."},
    {"last", T_OBJECT, offsetof(Recall, held) + LAST * sizeof(PyObject *), READONLY, "That call."},
    {"timeout_ns", T_LONGLONG, offsetof(Recall, timeout_ns), 0, "What each call may take."},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(recall_doc,
             "Recall(player, rank, acquire, release, Tensor, resume, note, stride)\n\n"
             "`rank` is the address of the rank's state, which `player` keeps; `acquire` and `release` are of the order of calls.\n"
             "What does not end at once is left to `resume(prepared, number)`; `note` gets the same of what it has to know.");

static PyType_Slot recall_slots[] = {
    {Py_tp_new, recall_new},         {Py_tp_dealloc, recall_dealloc}, {Py_tp_traverse, recall_traverse},
    {Py_tp_clear, recall_clear},     {Py_tp_methods, recall_methods}, {Py_tp_members, recall_members},
    {Py_tp_doc, (void *)recall_doc}, {0, NULL},
};

static PyType_Spec recall_spec = {"ringred.native._player.Recall", sizeof(Recall), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, recall_slots};

PyObject *recall_class(void) {
    struct {
        PyObject **name;
        const char *text;
    } names[] = {{&is_cpu, "is_cpu"}, {&is_contiguous, "is_contiguous"}, {&is_conj, "is_conj"}, {&is_neg, "is_neg"},
                 {&data_ptr, "data_ptr"}, {&numel, "numel"}, {&dtype, "dtype"}};
    for (size_t at = 0; at < sizeof names / sizeof *names; at++)
        if (!(*names[at].name = PyUnicode_InternFromString(names[at].text))) return NULL;
    return PyType_FromSpec(&recall_spec);
}
