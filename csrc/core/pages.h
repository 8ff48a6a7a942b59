/* pages.h: memory on huge pages where the system gives them: for weights that are streamed again and again, for results. */
#ifndef QL_PAGES_H
#define QL_PAGES_H

#include <stddef.h>
#include <stdint.h>

/* `bytes` bytes on a multiple of 64, zero; NULL where there are none. Blocks share chunks of huge pages; a chunk goes back to the
 * system when the last of its blocks is released. Any thread may call both. */
void *ql_pages_take(int64_t bytes);
void ql_pages_release(void *block); /* NULL: nothing */

/* `bytes` bytes on a multiple of 64, which realloc() may move; NULL where there are none. A large block that is released may wait for
 * the next call (memory.c). */
void *ql_lines_take(size_t bytes);
void ql_lines_release(void *memory); /* NULL: nothing */

#endif
