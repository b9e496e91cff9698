/* The class ringred.native._player.Recall: finds a call that was made before by its arguments, and plays its tape again,
 * without Python. What it does not know, and all that has to wait for long or goes wrong, it leaves to Python. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "keys.h"
#include "layout.h"
PyObject *recall_class(void);

/* A call that is kept keeps its plan, up to 1 MiB of copies. With four tries, two of a dozen calls could take one another's
 * place for ever. */
enum { PLACES = 256, TRIES = 32 };

typedef struct {
    PyObject *prepared, *tape, *objects; /* the call, what it plays, and the objects of the key, which stay as long */
    int64_t address, digest;             /* of the tape, and of what all ranks have to ask for alike */
    int64_t *number;                     /* of the last such call */
    int left;                            /* this rank may be done before the others have begun */
    int64_t length, words[];
} Known;

/* What a Recall holds: whose the rank's state is, the order's methods, what is under way (doing.py), what Python does when
 * a call did not end at once, failed in that, or has to be noted, and the call that was recalled last. */
enum { PLAYER, ACQUIRE, RELEASE, DOINGS, RESUME, ABANDON, NOTE, LAST, HELD };

typedef struct {
    PyObject_HEAD
    Rank *rank;
    PyObject *held[HELD];
    unsigned long long stride;
    long long number, recalled, timeout_ns;
    char armed, stale, one_way;
    Keys keys;
    Known *table[PLACES];
} Recall;

/* ---------------------------------------------------------------- what is kept */

static int is_of(const Known *known, const Key *key) {
    return known && known->length == key->length && !memcmp(known->words, key->words, 8 * (size_t)key->length);
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
    Py_XDECREF(known->tape);
    Py_XDECREF(known->objects);
    PyMem_Free(known);
}

static void forget(Recall *self) {
    self->stale = 0;
    for (int at = 0; at < PLACES; at++) let_go(self->table + at);
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

/* Says what is under way, so that nothing else begins, and has Python go on with it. What is raised before it could ends
 * the call as well. */
static int resumed(Recall *self, PyObject *prepared, long long number, int of_a_pair) {
    PyObject *frame = (PyObject *)PyEval_GetFrame(), *call = PySequence_GetItem(prepared, 0);
    PyObject *current = call ? Py_BuildValue("(LOOO)", number, call, frame ? frame : Py_None, of_a_pair ? Py_True : Py_False)
                             : NULL;
    Py_XDECREF(call);
    self->armed = 0;
    int told = current && !PyObject_SetAttrString(self->held[DOINGS], "current", current);
    Py_XDECREF(current);
    PyObject *done = told ? PyObject_CallFunctionObjArgs(self->held[RESUME], prepared, NULL) : NULL;
    Py_XDECREF(done);
    if (done) return 1;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    PyObject *ended = PyObject_CallFunctionObjArgs(self->held[ABANDON], prepared, value, NULL);
    if (!ended) PyErr_WriteUnraisable(self->held[ABANDON]);
    Py_XDECREF(ended);
    PyErr_Restore(type, value, traceback);
    return 0;
}

static PyObject *replayed(Recall *self, const Known *known) {
    PyObject *prepared = known->prepared, *before = self->held[LAST];
    int left = known->left, of_a_pair = known->number != (int64_t *)&self->number;
    long long number = ++*known->number;
    uint64_t contract = (uint64_t)known->digest + (uint64_t)number * self->stride; /* contract() of runtime/recall.py */
    int ended;
    Py_BEGIN_ALLOW_THREADS
    ended = play(self->rank, (Tape *)known->address, (int64_t)(contract & CONTRACT_BITS), self->timeout_ns, 0, BRIEFLY);
    Py_END_ALLOW_THREADS
    Py_INCREF(prepared);
    self->held[LAST] = prepared;
    self->recalled = number;
    Py_XDECREF(before);
    int well = 1;
    Py_INCREF(prepared); /* a signal handler may make other calls, and have this one forgotten */
    if (ended != DONE) {
        well = resumed(self, prepared, number, of_a_pair);
    } else if (left || self->one_way) {
        PyObject *noted = PyObject_CallFunction(self->held[NOTE], "OLO", prepared, number, left ? Py_True : Py_False);
        well = noted != NULL;
        Py_XDECREF(noted);
    }
    Py_DECREF(prepared);
    if (!well) return NULL;
    Py_RETURN_TRUE;
}

PyDoc_STRVAR(recall_play_doc,
             "play(prepare, *arguments) -> whether it was done\n\n"
             "Plays the call that was kept for these, if it is armed; raises what `resume` raises.");

static PyObject *recall_play(Recall *self, PyObject *const *args, Py_ssize_t given) {
    if (!self->armed) Py_RETURN_FALSE;
    if (!called(self->held[ACQUIRE])) return NULL;
    if (self->stale) forget(self);
    Key key;
    int found = self->armed ? key_of(&self->keys, &key, args, given) : 0;
    if (found < 0) return released(self, NULL);
    Known *known = found && self->armed ? *place_of(self, &key) : NULL; /* torch may have run Python meanwhile */
    if (is_of(known, &key)) return released(self, replayed(self, known));
    Py_INCREF(Py_False);
    return released(self, Py_False);
}

PyDoc_STRVAR(recall_keep_doc,
             "keep(prepared, tape, address, digest, number, left, identity)\n\n"
             "Keeps a call for `play`, holding the order. `address` is that of `tape`, `number` that of the number of the last\n"
             "such call, 0 for a collective; `left` says that this rank may be done before the others have begun.");

static PyObject *recall_keep(Recall *self, PyObject *args) {
    PyObject *prepared, *tape, *identity;
    long long address, digest, number;
    int left;
    if (!PyArg_ParseTuple(args, "OOLLLpO!", &prepared, &tape, &address, &digest, &number, &left, &PyTuple_Type, &identity))
        return NULL;
    if (self->stale) forget(self);
    Key key;
    if (!key_from(&key, identity)) Py_RETURN_NONE;
    Known *known = PyMem_Calloc(1, sizeof(Known) + 8 * (size_t)key.length);
    if (!known) return PyErr_NoMemory();
    *known = (Known){prepared, tape, identity, address, digest, (int64_t *)number, left, key.length};
    if (!number) known->number = (int64_t *)&self->number;
    memcpy(known->words, key.words, 8 * (size_t)key.length);
    Py_INCREF(prepared);
    Py_INCREF(tape);
    Py_INCREF(identity);
    Known **place = place_of(self, &key), *before = *place;
    *place = known;
    let_go(&before);
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- the class */

static int recall_traverse(Recall *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    for (int at = 0; at < HELD; at++) Py_VISIT(self->held[at]);
    Py_VISIT(self->keys.plain);
    Py_VISIT(self->keys.examples);
    for (int at = 0; at < PLACES; at++) {
        Known *known = self->table[at];
        if (!known) continue;
        Py_VISIT(known->prepared);
        Py_VISIT(known->tape);
        Py_VISIT(known->objects);
    }
    return 0;
}

static int recall_clear(Recall *self) {
    self->armed = 0;
    for (int at = 0; at < HELD; at++) Py_CLEAR(self->held[at]);
    Py_CLEAR(self->keys.plain);
    Py_CLEAR(self->keys.examples);
    forget(self);
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
    PyObject *held[HELD] = {NULL}, *plain, *examples;
    if (!PyArg_ParseTuple(args, "OLOOOO!OOOOK", held + PLAYER, &rank, held + ACQUIRE, held + RELEASE, &plain, &PyTuple_Type,
                          &examples, held + DOINGS, held + RESUME, held + ABANDON, held + NOTE, &stride))
        return NULL;
    Recall *self = (Recall *)PyType_GenericAlloc(type, 0);
    if (!self) return NULL;
    memcpy(self->held, held, sizeof held);
    for (int at = 0; at < LAST; at++) Py_INCREF(held[at]);
    if (!know(&self->keys, plain, examples)) {
        Py_DECREF(self);
        return NULL;
    }
    self->rank = (Rank *)rank, self->stride = stride;
    return (PyObject *)self;
}

static PyMethodDef recall_methods[] = {
    {"play", (PyCFunction)(void (*)(void))recall_play, METH_FASTCALL, recall_play_doc},
    {"keep", (PyCFunction)recall_keep, METH_VARARGS, recall_keep_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef recall_members[] = {
    {"armed", T_BOOL, offsetof(Recall, armed), 0, "Whether calls are played here; Python makes it true."},
    {"stale", T_BOOL, offsetof(Recall, stale), 0, "Whether all calls are to be forgotten."},
    {"one_way", T_BOOL, offsetof(Recall, one_way), 0, "Whether Python is told of each call by `note`."},
    {"number", T_LONGLONG, offsetof(Recall, number), 0, "The number of the last collective."},
    {"recalled", T_LONGLONG, offsetof(Recall, recalled), 0, "The number of the last call that was played here."},
    {"last", T_OBJECT, offsetof(Recall, held) + LAST * sizeof(PyObject *), READONLY, "That call."},
    {"timeout_ns", T_LONGLONG, offsetof(Recall, timeout_ns), 0, "What each call may take."},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(recall_doc,
             "Recall(player, rank, acquire, release, Tensor, examples, doings, resume, abandon, note, stride)\n\n"
             "`rank` is the address of the rank's state, which `player` keeps; `acquire` and `release` are of the order of calls.\n"
             "What does not end at once becomes `doings.current` and is left to `resume(prepared)`; `abandon(prepared, failure)`\n"
             "is called if that raises; `note(prepared, number, left)` is told of what it has to know.");

static PyType_Slot recall_slots[] = {
    {Py_tp_new, recall_new},         {Py_tp_dealloc, recall_dealloc}, {Py_tp_traverse, recall_traverse},
    {Py_tp_clear, recall_clear},     {Py_tp_methods, recall_methods}, {Py_tp_members, recall_members},
    {Py_tp_doc, (void *)recall_doc}, {0, NULL},
};

static PyType_Spec recall_spec = {"ringred.native._player.Recall", sizeof(Recall), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, recall_slots};

PyObject *recall_class(void) { return intern_names() ? PyType_FromSpec(&recall_spec) : NULL; }
