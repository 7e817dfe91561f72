/* What every fuzz target checks: a record or a fault, and nothing that points outside the message. */
#ifndef PFK_FUZZ_CHECK_H
#define PFK_FUZZ_CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../pfk.h"
#include "abis.h"	/* the Abi tables, written by tests/fuzz_corpus.py from those of the package */

#define REQUIRE(holds) do { if (!(holds)) complain(#holds, __LINE__); } while (0)

static void complain(const char *what, int line)
{
	fprintf(stderr, "line %d: not so: %s\n", line, what);
	abort();
}

/* The first byte of an input says whose message the rest is. */
static const struct pfk_abi *abi_of(uint8_t first)
{
	return &abis[first % (sizeof abis / sizeof abis[0])];
}

static void check_part(const struct pfk_part *part, size_t length)
{
	REQUIRE(part->offset <= length && part->length <= length - part->offset);
}

static void check_record(const struct pfk_record *record, size_t length)
{
	REQUIRE(record->version == 2 && record->count <= PFK_MAX_EXTENSIONS && (size_t)record->words * 8 == length);
	for (unsigned i = 0; i < record->count; i++)
		REQUIRE((size_t)record->offset[i] * 8 + 8 <= length && (i == 0 || record->offset[i] > record->offset[i - 1]));
	REQUIRE(record->count == 64 || record->valid >> record->count == 0);
	for (int i = 0; i < 2; i++) {
		int here = (int)(record->present >> (PFK_ADDRESS_SRC + i) & 1);

		REQUIRE(!here || record->address[i].version == 4 || record->address[i].version == 6);
	}
	for (int i = 0; i < 2; i++) {
		check_part(&record->key[i].data, length);
		check_part(&record->supported[i].algorithms, length);
	}
	check_part(&record->policy_requests, length);
	check_part(&record->body, length);
}

static void check_fault(const struct pfk_fault *fault, int reason, size_t length)
{
	REQUIRE(reason > 0 && reason < PFK_REASONS && fault->reason == (uint32_t)reason);
	REQUIRE(fault->offset <= length);
	REQUIRE(strcmp(pfk_reason(fault->reason), "unknown reason") != 0);
}

#endif
