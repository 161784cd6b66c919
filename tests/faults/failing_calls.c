/* Preloaded into a process (LD_PRELOAD), this makes the n-th call of one kind fail, as a full or failing disk does.
 *
 * Only calls on files under the folder FAULT_FOLDER count. FAULT_CALL is a kind of `NAMES`, FAULT_AT the number of the
 * call (1 is the first), FAULT_ERROR an error number, FAULT_STAYS 1 if all later calls of the kind fail too. A process
 * that forks sets them by `fault_arm` instead. Counts and hits lie in memory that forked processes share.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE, RENAME, FSYNC, ALLOCATE, MMAP, KINDS };
static const char *NAMES[KINDS] = {"write", "rename", "fsync", "allocate", "mmap"};

static struct {
    atomic_long counts[KINDS];
    atomic_long hits;
} *shared;
static char folder[PATH_MAX];
static size_t folder_length;
static int armed_kind = -1, armed_error, armed_stays;
static long armed_at;

long fault_count(int kind) { return shared->counts[kind]; }
long fault_hits(void) { return shared->hits; }

/* Count from 0 again; let call number `at` of `kind` (-1: none) under `where` fail with `error`. */
void fault_arm(const char *where, int kind, long at, int error, int stays) {
    snprintf(folder, sizeof folder, "%s", where);
    folder_length = strlen(folder);
    armed_kind = kind;
    armed_at = at;
    armed_error = error;
    armed_stays = stays;
    for (int i = 0; i < KINDS; i++) shared->counts[i] = 0;
    shared->hits = 0;
}

__attribute__((constructor)) static void begin(void) {
    void *(*map)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap");
    shared = map(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    const char *where = getenv("FAULT_FOLDER"), *call = getenv("FAULT_CALL"), *at = getenv("FAULT_AT");
    const char *error = getenv("FAULT_ERROR"), *stays = getenv("FAULT_STAYS");
    if (!where) return;
    int kind = -1;
    for (int i = 0; call && i < KINDS; i++)
        if (!strcmp(call, NAMES[i])) kind = i;
    fault_arm(where, kind, at ? atol(at) : 1, error ? atoi(error) : ENOSPC, stays ? atoi(stays) : 0);
}

static int inside(const char *path) {
    return folder_length && !strncmp(path, folder, folder_length) && path[folder_length] == '/';
}

static int inside_handle(int handle) {
    char link[64], path[PATH_MAX];
    if (handle < 0 || !folder_length) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return inside(path);
}

/* Count a call; whether it is to fail. */
static int fails(int kind) {
    long number = ++shared->counts[kind];
    int hit = kind == armed_kind && (armed_stays ? number >= armed_at : number == armed_at);
    if (hit) shared->hits++;
    return hit;
}

#define CHECK(kind, condition, result)  \
    do {                                \
        int before = errno;             \
        if ((condition) && fails(kind)) { \
            errno = armed_error;        \
            return result;              \
        }                               \
        errno = before;                 \
    } while (0)
#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

ssize_t write(int handle, const void *data, size_t size) {
    CHECK(WRITE, inside_handle(handle), -1);
    return REAL(write)(handle, data, size);
}
ssize_t writev(int handle, const struct iovec *parts, int count) {
    CHECK(WRITE, inside_handle(handle), -1);
    return REAL(writev)(handle, parts, count);
}
ssize_t pwrite(int handle, const void *data, size_t size, off_t at) {
    CHECK(WRITE, inside_handle(handle), -1);
    return REAL(pwrite)(handle, data, size, at);
}
ssize_t pwrite64(int handle, const void *data, size_t size, off64_t at) {
    CHECK(WRITE, inside_handle(handle), -1);
    return REAL(pwrite64)(handle, data, size, at);
}
int rename(const char *old, const char *new) {
    CHECK(RENAME, inside(new), -1);
    return REAL(rename)(old, new);
}
int renameat(int from, const char *old, int to, const char *new) {
    CHECK(RENAME, inside(new), -1);
    return REAL(renameat)(from, old, to, new);
}
int fsync(int handle) {
    CHECK(FSYNC, inside_handle(handle), -1);
    return REAL(fsync)(handle);
}
int fdatasync(int handle) {
    CHECK(FSYNC, inside_handle(handle), -1);
    return REAL(fdatasync)(handle);
}
int ftruncate(int handle, off_t size) {
    CHECK(ALLOCATE, inside_handle(handle), -1);
    return REAL(ftruncate)(handle, size);
}
int ftruncate64(int handle, off64_t size) {
    CHECK(ALLOCATE, inside_handle(handle), -1);
    return REAL(ftruncate64)(handle, size);
}
int posix_fallocate(int handle, off_t begin, off_t size) {
    CHECK(ALLOCATE, inside_handle(handle), armed_error);
    return REAL(posix_fallocate)(handle, begin, size);
}
int posix_fallocate64(int handle, off64_t begin, off64_t size) {
    CHECK(ALLOCATE, inside_handle(handle), armed_error);
    return REAL(posix_fallocate64)(handle, begin, size);
}
void *mmap(void *address, size_t size, int access, int flags, int handle, off_t begin) {
    CHECK(MMAP, !(flags & MAP_ANONYMOUS) && inside_handle(handle), MAP_FAILED);
    return REAL(mmap)(address, size, access, flags, handle, begin);
}
void *mmap64(void *address, size_t size, int access, int flags, int handle, off64_t begin) {
    CHECK(MMAP, !(flags & MAP_ANONYMOUS) && inside_handle(handle), MAP_FAILED);
    return REAL(mmap64)(address, size, access, flags, handle, begin);
}
