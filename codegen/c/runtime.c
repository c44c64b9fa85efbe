/* Runs kernels: a launch on one thread or on several, and lists of launches in one call.
 *
 * Threads are those of the OpenMP runtime that torch has loaded: its symbols are found in the process, nothing is
 * linked. Where there is none, everything runs on the calling thread.
 */
#include <stdint.h>

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
#pragma weak omp_get_num_threads
#pragma weak omp_get_thread_num
#pragma weak omp_in_parallel
extern void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);
extern int omp_get_max_threads(void);
extern int omp_get_num_threads(void);
extern int omp_get_thread_num(void);
extern int omp_in_parallel(void);

int alone; /* set in a forked child: its parent's threads are not there */

/* How many threads a call can use at most. */
int threads(void) { return !alone && GOMP_parallel && omp_get_max_threads ? omp_get_max_threads() : 1; }

static void share(void *data) {
    const struct launch *launch = data;
    int64_t count = omp_get_num_threads(), each = (launch->units + count - 1) / count;
    int64_t begin = each * omp_get_thread_num(), end = begin + each;
    if (end > launch->units) end = launch->units;
    if (begin < end) launch->body(launch->operands, launch->geometry, begin, end);
}

void run(const struct launch *launch) {
    if (launch->units >= 2 * launch->grain) {
        int64_t most = launch->units / launch->grain, count = threads();
        if (count > most) count = most;
        if (count > 1 && !omp_in_parallel()) {
            GOMP_parallel(share, (void *)launch, (unsigned)count, 0);
            return;
        }
    }
    launch->body(launch->operands, launch->geometry, 0, launch->units);
}

struct chain {
    const struct launch *const *launches;
    int64_t count;
};

void run_chain(const struct chain *chain) {
    for (int64_t index = 0; index < chain->count; index++) run(chain->launches[index]);
}
