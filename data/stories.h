/* Made-up stories in the manner of TinyStories, from a grammar of our own: the embedded data set, so that nothing need
   be downloaded. Story i of a seed is always the same text, whatever was made before it. */
#ifndef GSA_STORIES_H
#define GSA_STORIES_H

#include "../gsa/util.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Story number index of this seed; malloc'd, ends without a newline, *bytes without the final 0. About 300 to 700
   bytes. */
char *story(uint64_t seed, uint64_t index, size_t *bytes);

/* Stories 0, 1, 2 ... of this seed, each followed by a line <|endoftext|>, until at least `bytes` bytes; malloc'd;
   *got their length. */
char *stories(uint64_t seed, size_t bytes, size_t *got);

/* Questions about story number index that the story itself answers; false or NULL where it has none. All texts are
   malloc'd. Choice: the story up to some sentence, and that sentence with its own word for a person, colour, object
   or animal named before, endings[*label], or with another word of the same kind. The context ends without a space,
   or with the newline of a new paragraph. Last word: the story up to and with the name of an object that stood in it
   before, behind the same colour. */
enum { STORY_ENDINGS = 4 };
bool story_choice(uint64_t seed, uint64_t index, char **context, char *endings[STORY_ENDINGS], int *label);
char *story_last_word(uint64_t seed, uint64_t index);

#ifdef __cplusplus
}
#endif
#endif
