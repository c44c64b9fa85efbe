/* Runs kernels: a launch on one thread or on several, and lists of launches in one call.
 *
 * Threads are those of the OpenMP runtime that torch has loaded: its symbols are found in the process, nothing is
 * linked. Where there is none, everything runs on the calling thread.
 */
#include <sched.h>
#include <stdint.h>

#define PIECES 4   /* of a launch for each thread: one that is held up holds up little */
#define FINER 4    /* within a team, passing work on costs a fraction of what waking a thread costs */
#define SPINS 4096 /* until a thread that waits lets others run */
#if defined(__x86_64__)
#define PAUSE __builtin_ia32_pause()
#else
#define PAUSE (void)0
#endif

typedef void body(void *const *operands, const int64_t *geometry, int64_t begin, int64_t end);

struct launch {
    body *body;
    void *const *operands;
    const int64_t *geometry;
    int64_t units; /* of work, in order; each is computed by one thread, the same way whichever it is */
    int64_t grain; /* the fewest units that are worth a thread */
};

#pragma weak GOMP_parallel
#pragma weak omp_get_max_threads
#pragma weak omp_in_parallel
extern void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);
extern int omp_get_max_threads(void);
extern int omp_in_parallel(void);

int failures; /* of bodies, so far */

int alone; /* set in a forked child: its parent's threads are not there */

/* How many threads a call can use at most. */
int threads(void) { return !alone && GOMP_parallel && omp_get_max_threads ? omp_get_max_threads() : 1; }

/* Launches that one thread runs in a row, or one launch in pieces. A thread that comes late finds all of it taken and goes
 * on; nobody waits for a thread but for one that has taken a piece. */
struct phase {
    int64_t first, last; /* launches */
    int64_t pieces;
    int64_t taken, done; /* pieces */
};

struct team {
    const struct launch *const *launches;
    struct phase *phases;
    int64_t count;
};

static void run_piece(const struct team *team, const struct phase *phase, int64_t piece) {
    const struct launch *launch = team->launches[phase->first];
    if (phase->pieces > 1) {
        int64_t begin = launch->units * piece / phase->pieces, end = launch->units * (piece + 1) / phase->pieces;
        launch->body(launch->operands, launch->geometry, begin, end);
        return;
    }
    for (int64_t index = phase->first; index <= phase->last; index++) {
        launch = team->launches[index];
        launch->body(launch->operands, launch->geometry, 0, launch->units);
    }
}

static void take_part(void *data) {
    const struct team *team = data;
    for (struct phase *phase = team->phases; phase < team->phases + team->count; phase++) {
        int64_t piece;
        while ((piece = __atomic_fetch_add(&phase->taken, 1, __ATOMIC_RELAXED)) < phase->pieces) {
            run_piece(team, phase, piece);
            __atomic_fetch_add(&phase->done, 1, __ATOMIC_RELEASE);
        }
        for (int64_t spins = 0; __atomic_load_n(&phase->done, __ATOMIC_ACQUIRE) < phase->pieces; spins++) {
            if (spins > SPINS) sched_yield();
            PAUSE;
        }
    }
}

static void run_all(const struct launch *const *launches, int64_t count) {
    int64_t most = threads(), shares = 0;
    if (most > 1 && !omp_in_parallel()) {
        struct phase phases[count];
        int64_t phase = 0;
        for (int64_t index = 0; index < count; index++) {
            const struct launch *launch = launches[index];
            int64_t pieces = launch->units * FINER / launch->grain, enough = pieces;
            if (pieces > PIECES * most) pieces = PIECES * most;
            if (pieces > launch->units) pieces = launch->units;
            if (pieces < 2) pieces = 1;
            if (pieces > 1) shares += enough;
            if (pieces == 1 && phase && phases[phase - 1].pieces == 1)
                phases[phase - 1].last = index;
            else
                phases[phase++] = (struct phase){index, index, pieces, 0, 0};
        }
        shares /= FINER;
        if (shares > 1) {
            struct team team = {launches, phases, phase};
            GOMP_parallel(take_part, &team, (unsigned)(shares < most ? shares : most), 0);
            return;
        }
    }
    for (int64_t index = 0; index < count; index++) {
        const struct launch *launch = launches[index];
        launch->body(launch->operands, launch->geometry, 0, launch->units);
    }
}

/* These return whether a body has failed meanwhile, here or in a call at the same time. */
int run(const struct launch *launch) {
    int before = __atomic_load_n(&failures, __ATOMIC_RELAXED);
    run_all(&launch, 1);
    return __atomic_load_n(&failures, __ATOMIC_RELAXED) != before;
}

struct chain {
    const struct launch *const *launches;
    int64_t count;
};

int run_chain(const struct chain *chain) {
    int before = __atomic_load_n(&failures, __ATOMIC_RELAXED);
    run_all(chain->launches, chain->count);
    return __atomic_load_n(&failures, __ATOMIC_RELAXED) != before;
}
