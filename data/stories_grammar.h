/* The grammar of the made-up stories, as tables: words, slots, beats and plots. data/stories.c writes stories with it
   and test/check_stories.c reads them with it, so there is nothing else to keep in step.

   A plot is a row of beats; a beat is one sentence, to be told in one of several ways; a way of telling has slots in
   braces. A slot keeps its word through the whole story: the {look} {thing} of the second sentence is the one that is
   found in the eleventh, and that is what a model has to remember. A slot's name with a capital letter writes its word
   with one. No word that can follow "a" begins with a vowel. */
#ifndef GSA_STORIES_GRAMMAR_H
#define GSA_STORIES_GRAMMAR_H

#include <stddef.h>

/* ---- words; a word listed twice is chosen twice as often */

typedef const char *const WordList[];

static WordList words_girl = {"Mia", "Lily", "Anna", "Zoe", "Emma", "Ruby", "Lucy", "Rosa", "Sara", "Kate", NULL};
static WordList words_boy = {"Tom", "Ben", "Max", "Leo", "Sam", "Tim", "Jack", "Finn", "Paul", "Luke", NULL};
static WordList words_girl_kind = {"girl", "girl", "girl", "girl", "bear", "cat", "dog", "lion", NULL};
static WordList words_boy_kind = {"boy", "boy", "boy", "boy", "bear", "cat", "dog", "lion", NULL};
static WordList words_girl_friend = {"girl", NULL}, words_boy_friend = {"boy", NULL};
static WordList words_woman = {"mom", "grandma", "aunt", NULL};
static WordList words_man = {"dad", "grandpa", "uncle", NULL};
static WordList words_she = {"she", NULL}, words_he = {"he", NULL};
static WordList words_her = {"her", NULL}, words_his = {"his", NULL}, words_him = {"him", NULL};
static WordList words_trait = {"kind", "brave", "clever", "shy", "quiet", "funny", "gentle", "little", "silly", "friendly", NULL};
static WordList words_look = {"red", "blue", "green", "yellow", "pink", "white", "black", "golden", "shiny", "big", NULL};
static WordList words_thing = {"ball", "kite", "doll", "hat", "book", "drum", "boat", "car", "cup", "bell", "key", "ring", "train", "shell", "flute", "robot", NULL};
static WordList words_place = {"park", "beach", "lake", "river", "farm", "pond", "barn", "market", "zoo", "castle", NULL};
static WordList words_where = {"under", "behind", "near", NULL};
static WordList words_spot = {"bench", "bush", "tree", "rock", "gate", "wall", "fence", "wagon", NULL};
static WordList words_animal = {"bird", "kitten", "puppy", "duck", "frog", "rabbit", "turtle", "mouse", NULL};
static WordList words_food = {"soup", "bread", "cake", "pie", "milk", "honey", "cheese", "fruit", NULL};
static WordList words_game = {"run", "sing", "dance", "swim", "jump", "climb", "read", "draw", NULL};
static WordList words_glad = {"happy", "glad", "proud", "excited", NULL};
static WordList words_sad = {"sad", "upset", "worried", "lonely", NULL};
static WordList words_day = {"sunny", "warm", "windy", "cold", "cloudy", "fine", NULL};
static WordList words_magic = {"bright star", "full moon", "little fairy", "rainbow", "magic well", NULL};

/* ---- slots */

enum { NOBODY, HERO, FRIEND, ADULT, PERSONS };

typedef struct {
    const char *name;            /* in braces in the sentences below */
    int person;                  /* whose sex chooses between the two lists */
    const char *const *words[2]; /* she, he */
    const char *differs;         /* the slot whose word this one must not take */
} Slot;

static const Slot slots[] = {
    {"hero", HERO, {words_girl, words_boy}, NULL},
    {"kind", HERO, {words_girl_kind, words_boy_kind}, NULL},
    {"she", HERO, {words_she, words_he}, NULL},
    {"her", HERO, {words_her, words_his}, NULL}, /* her house, his house */
    {"him", HERO, {words_her, words_him}, NULL}, /* saw her, saw him */
    {"friend", FRIEND, {words_girl, words_boy}, "hero"},
    {"fkind", FRIEND, {words_girl_friend, words_boy_friend}, NULL},
    {"fshe", FRIEND, {words_she, words_he}, NULL},
    {"fher", FRIEND, {words_her, words_his}, NULL},
    {"fhim", FRIEND, {words_her, words_him}, NULL},
    {"adult", ADULT, {words_woman, words_man}, NULL},
    {"ashe", ADULT, {words_she, words_he}, NULL},
    {"aher", ADULT, {words_her, words_his}, NULL},
    {"ahim", ADULT, {words_her, words_him}, NULL},
    {"trait", NOBODY, {words_trait, words_trait}, NULL},
    {"ftrait", NOBODY, {words_trait, words_trait}, "trait"},
    {"look", NOBODY, {words_look, words_look}, NULL},
    {"thing", NOBODY, {words_thing, words_thing}, NULL},
    {"flook", NOBODY, {words_look, words_look}, "look"},
    {"fthing", NOBODY, {words_thing, words_thing}, "thing"},
    {"place", NOBODY, {words_place, words_place}, NULL},
    {"faraway", NOBODY, {words_place, words_place}, "place"},
    {"where", NOBODY, {words_where, words_where}, NULL},
    {"spot", NOBODY, {words_spot, words_spot}, NULL},
    {"wrong", NOBODY, {words_spot, words_spot}, "spot"},
    {"animal", NOBODY, {words_animal, words_animal}, NULL},
    {"food", NOBODY, {words_food, words_food}, NULL},
    {"game", NOBODY, {words_game, words_game}, NULL},
    {"glad", NOBODY, {words_glad, words_glad}, NULL},
    {"sad", NOBODY, {words_sad, words_sad}, NULL},
    {"day", NOBODY, {words_day, words_day}, NULL},
    {"magic", NOBODY, {words_magic, words_magic}, NULL},
};
enum { SLOTS = sizeof slots / sizeof slots[0] };

/* ---- beats: each a sentence, told in one of these ways */

enum { MAX_WAYS = 5 };
typedef struct {
    const char *name;
    const char *ways[MAX_WAYS];
} Beat;

static const Beat beats[] = {
    /* beginnings, for every plot */
    {"opening", {"Once upon a time, there was a {trait} {kind} named {hero}.",
                 "Once there was a {kind} called {hero} who was very {trait}.",
                 "In a small house near the {place}, there lived a {trait} {kind} named {hero}.",
                 "Long ago, a {trait} {kind} named {hero} lived with {her} {adult}.",
                 "{Hero} was a {trait} {kind} who lived near the {place}."}},
    {"likes", {"{She} loved to {game} in the sun.",
               "Every day, {she} liked to {game} with {her} {adult}.",
               "{Hero} liked to {game} and to eat {food}.",
               "More than anything, {hero} loved to {game}."}},
    {"owns", {"{She} had a {look} {thing} that {she} loved very much.",
              "{Her} {adult} gave {him} a {look} {thing} one morning.",
              "On {her} birthday, {hero} got a {look} {thing} from {her} {adult}.",
              "{Her} favorite toy was a {look} {thing}.",
              "{Hero} had a {look} {thing} and took it everywhere."}},
    {"go", {"One {day} day, {hero} went to the {place} with {her} {look} {thing}.",
            "One {day} morning, {she} carried the {look} {thing} to the {place}.",
            "One day, {hero} and {her} {adult} took the {look} {thing} to the {place}.",
            "The next day was {day}, so {hero} brought the {thing} to the {place}."}},
    {"walk", {"One {day} day, {hero} went for a walk to the {place}.",
              "One {day} morning, {she} walked to the {place} all alone.",
              "One day, {hero} and {her} {adult} went to the {place}.",
              "The next day was {day}, so {hero} went to the {place}."}},
    {"meet", {"There {she} met {her} friend {friend}.",
              "At the {place}, {she} met a {ftrait} {fkind} named {friend}.",
              "{Her} friend {friend} was there too.",
              "A {ftrait} {fkind} named {friend} came to play with {him}."}},
    {"friends", {"{Hero} had a {ftrait} friend named {friend}.",
                 "{Her} best friend was a {ftrait} {fkind} named {friend}.",
                 "{Hero} and {friend} were best friends.",
                 "Next door lived a {fkind} named {friend}, who was very {ftrait}."}},

    /* lost and found */
    {"play", {"They played with the {thing} all day long.",
              "{Hero} played with the {look} {thing} for a long time.",
              "It was so much fun to play with the {thing} at the {place}."}},
    {"lost", {"But when it was time to go home, the {look} {thing} was gone.",
              "Then {hero} looked around and could not see {her} {thing}.",
              "\"Where is my {look} {thing}?\" cried {hero}.",
              "{Hero} put the {thing} down, and soon {she} could not find it."}},
    {"cry", {"{She} was so {sad} that {she} began to cry.",
             "{Hero} felt very {sad}.",
             "A big tear ran down {her} face."}},
    {"search", {"{She} looked {where} the {wrong}, but it was not there.",
                "First {hero} ran to the {wrong}, but there was no {thing}.",
                "\"Maybe it is near the {wrong},\" {she} said, but it was not."}},
    {"advice", {"\"I saw something {look} {where} the {spot},\" said a little {animal}.",
                "A {animal} came by and said, \"Go and look {where} the {spot}.\"",
                "Then a {animal} told {him} to look {where} the {spot}."}},
    {"found", {"{Hero} ran to the {spot}, and there was the {look} {thing}.",
               "{She} looked {where} the {spot} and found {her} {look} {thing}.",
               "There it was, {where} the {spot}, the {look} {thing} that {she} had lost."}},
    {"thank animal", {"\"Thank you, little {animal},\" said {hero}.",
                      "{Hero} gave the {animal} some {food} to say thank you.",
                      "{She} was so {glad} that {she} danced with the {animal}."}},
    {"end lost", {"From that day on, {hero} never left {her} {look} {thing} at the {place} again.",
                  "After that, {hero} always took good care of the {look} {thing}.",
                  "{Hero} went home with the {look} {thing} and told {her} {adult} about the {animal}."}},

    /* sharing */
    {"friend wants", {"{Friend} saw the {look} {thing} and wanted to play with it too.",
                      "\"May I play with your {look} {thing}?\" asked {friend}.",
                      "{Friend} asked if {fshe} could hold the {look} {thing}."}},
    {"refuse", {"\"No, it is mine,\" said {hero}.",
                "But {hero} did not want to share and said no.",
                "{Hero} held the {thing} behind {her} back and said, \"No.\""}},
    {"friend sad", {"{Friend} was {sad} and walked away.",
                    "{Friend} felt {sad} and sat down {where} the {spot}.",
                    "So {friend} sat {where} the {spot} with {fher} head down."}},
    {"alone", {"{Hero} played alone, but it was no fun.",
               "Now {hero} had the {thing}, but nobody to play with.",
               "Soon {hero} felt alone and did not like it."}},
    {"adult says share", {"{Her} {adult} said, \"Playing is more fun with a friend.\"",
                          "\"Your friend looks {sad},\" said {her} {adult}.",
                          "{Hero} asked {her} {adult} what to do, and {ashe} said, \"You can share.\""}},
    {"share", {"{Hero} went to {friend} and gave {fhim} the {look} {thing}.",
               "\"I am sorry, let us play together,\" said {hero} to {friend}.",
               "So {hero} found {friend} {where} the {spot} and said, \"You can have a turn.\""}},
    {"play together", {"{Hero} and {friend} played with the {look} {thing} until the sun went down.",
                       "The two friends laughed and played with the {thing} at the {place}.",
                       "{Friend} was so {glad} that {fshe} gave {hero} some {food}."}},
    {"end share", {"{Hero} learned that it is good to share.",
                   "From that day on, {hero} always shared the {look} {thing} with {friend}.",
                   "That night, {hero} told {her} {adult}, \"It is fun to share my {thing}.\""}},

    /* a wish */
    {"wants", {"{Hero} wanted a {look} {thing} more than anything.",
               "{She} always dreamed of a {look} {thing}.",
               "{Friend} had a nice toy, but {hero} wanted a {look} {thing}."}},
    {"no money", {"But a {thing} cost too much money.",
                  "{Her} {adult} said, \"We do not have the money for a {thing}.\"",
                  "{She} looked for one at the {place}, but there was none."}},
    {"magic", {"One {day} night, {hero} looked up and saw a {magic}.",
               "One night, {she} saw a {magic} near the {place}.",
               "On the way home, {hero} came to the {place} and saw a {magic}."}},
    {"make wish", {"\"I wish for a {look} {thing},\" {she} said in a soft voice.",
                   "{Hero} closed {her} eyes and wished for a {look} {thing}.",
                   "{She} asked the {magic} for a {look} {thing}."}},
    {"sleep", {"Then {she} went to bed and slept.",
               "That night, {hero} could not sleep for a long time.",
               "{Hero} told {her} {adult} about the {magic} and went to sleep."}},
    {"morning box", {"In the morning, {she} saw a box {where} the {spot}.",
                     "The next day, there was a box {where} the {spot}.",
                     "When {hero} woke up, {her} {adult} said, \"There is a box {where} the {spot}.\""}},
    {"open box", {"{Hero} opened the box and found a {look} {thing} in it.",
                  "Inside the box was a {look} {thing}.",
                  "{She} opened it, and it was the {look} {thing} of {her} dreams."}},
    {"show friend", {"{She} ran to {friend} to show {fhim} the {thing}.",
                     "\"Look at my {look} {thing},\" {she} said to {friend}.",
                     "{Friend} came to see the {look} {thing} and was {glad} too."}},
    {"end wish", {"{Hero} never forgot the {magic}.",
                  "\"Thank you,\" {she} said to the {magic} that night.",
                  "From that day on, {hero} knew that a wish can come true.",
                  "{Hero} kept the {look} {thing} for the rest of {her} life."}},

    /* a storm */
    {"storm", {"Then the sky grew dark and a strong wind began to blow.",
               "Soon a big storm came, and the rain fell hard.",
               "All at once, there was a loud clap of thunder."}},
    {"blown", {"The wind took the {look} {thing} and carried it away to the {faraway}.",
               "The wind pulled the {thing} out of {her} hands and blew it over the {faraway}.",
               "The {look} {thing} flew up, over the {place} and over the {faraway}."}},
    {"run home", {"{Hero} ran home to {her} {adult} in the rain.",
                  "{She} was cold and wet and ran home as fast as {she} could.",
                  "{Her} {adult} came and took {him} home."}},
    {"comfort", {"{Her} {adult} gave {him} some warm {food} and a hug.",
                 "\"Do not be {sad},\" said {her} {adult}, \"the storm will pass.\"",
                 "{She} told {her} {adult} about the {look} {thing}."}},
    {"after storm", {"In the morning, the storm was over and the sun came out.",
                     "The next day, the sky was blue again.",
                     "At last, the rain stopped."}},
    {"knock", {"There was a knock at the door, and it was {friend}.",
               "Then {hero} saw {friend} come up the road with something in {fher} hands.",
               "A {ftrait} {fkind} named {friend} came to the house."}},
    {"friend brings", {"\"I found your {look} {thing} near the {faraway},\" said {friend}.",
                       "{Friend} had found the {look} {thing} at the {faraway}.",
                       "In {fher} bag was the {look} {thing} from the {faraway}."}},
    {"thank friend", {"{Hero} was so {glad} that {she} gave {friend} a big hug.",
                      "\"Thank you, {friend},\" said {hero} with a smile.",
                      "{Hero} gave {friend} some {food}, and they ate it together."}},
    {"end storm", {"From that day on, {hero} and {friend} were good friends.",
                   "After that, {hero} stayed home with {her} {thing} when the wind was strong.",
                   "{Hero} and {friend} looked at the sky and were not afraid of storms again."}},

    /* a quarrel */
    {"find toy", {"One {day} day, they found a {look} {thing} at the {place}.",
                  "One day, {hero} and {friend} saw a {look} {thing} {where} the {spot}.",
                  "On a {day} morning, the two friends went to the {place} and found a {look} {thing}."}},
    {"mine", {"\"I saw it first,\" said {hero}.",
              "\"The {thing} is mine,\" said {friend}.",
              "{Hero} wanted the {thing}, and {friend} wanted it too."}},
    {"pull", {"They both pulled and pulled.",
              "{Hero} pulled on one side, and {friend} pulled on the other side.",
              "The two friends began to shout."}},
    {"breaks", {"Then the {look} {thing} broke and fell to the ground.",
                "All at once, the {thing} fell into the mud and broke.",
                "There was a loud crack, and the {look} {thing} was broken."}},
    {"part", {"{Friend} ran home, and {hero} was alone.",
              "{Hero} was angry and went home to {her} {adult}.",
              "They did not say a word and walked home."}},
    {"regret", {"At home, {hero} was {sad} because {she} missed {friend}.",
                "{Her} {adult} said, \"A friend is better than a {thing}.\"",
                "{Hero} thought about {friend} all night."}},
    {"make up", {"The next day, {hero} went to {friend} and said, \"I am sorry.\"",
                 "In the morning, {friend} came to {hero} and said, \"I am sorry.\"",
                 "\"I am sorry that I was angry,\" said {hero} to {friend}."}},
    {"mend together", {"They took the {look} {thing} and fixed it together.",
                       "{Friend} had some glue, and so they fixed the {thing}.",
                       "{Her} {adult} helped them fix the {look} {thing}."}},
    {"end quarrel", {"{Hero} and {friend} never shouted about the {thing} again.",
                     "From that day on, the {look} {thing} was for both of them.",
                     "They learned that friends should not fight."}},

    /* learning */
    {"cannot", {"{Hero} wanted to {game}, but {she} did not know how.",
                "{She} dreamed that one day {she} would know how to {game}.",
                "All {her} friends knew how to {game}, but {hero} did not."}},
    {"try", {"One {day} day, {she} went to the {place} to try it.",
             "{Hero} tried to {game} at the {place}, but it was too hard.",
             "{She} tried once, and {she} tried again, but {she} could not {game}."}},
    {"fail", {"{She} fell down and hurt {her} knee.",
              "It all went wrong, and {hero} felt {sad}.",
              "\"I will never learn to {game},\" said {hero}."}},
    {"teacher", {"{Friend} saw {him} and said, \"I can help you.\"",
                 "A {ftrait} {fkind} named {friend} sat {where} the {spot} and saw it all.",
                 "Then {friend} came, who knew how to {game} very well."}},
    {"teach", {"{Friend} showed {him} how to {game}, step by step.",
               "\"Do it slowly and do not give up,\" said {friend}.",
               "{Fshe} told {hero} to take a deep breath and try again."}},
    {"practice", {"Every day, they met at the {place} to {game}.",
                  "{Hero} tried every day, in the sun and in the rain.",
                  "{Hero} and {friend} met {where} the {spot} each morning."}},
    {"can", {"After a week, {hero} could {game} all by {her} own.",
             "Then one day, {she} could {game} as well as {friend}.",
             "\"Look, I can {game},\" shouted {hero}."}},
    {"show adult", {"{Her} {adult} came to the {place} to see it and was {glad}.",
                    "{She} showed {her} {adult} how well {she} could {game}.",
                    "\"You are so good at it,\" said {her} {adult}."}},
    {"end learn", {"{Hero} learned that it is good to try again and again.",
                   "{Hero} gave {friend} a {look} {thing} to say thank you.",
                   "From that day on, {hero} and {friend} went to the {place} to {game} together.",
                   "Now {hero} helps others who want to learn to {game}."}},

    /* helping an animal */
    {"see animal", {"There {she} saw a little {animal} {where} the {spot}.",
                    "{Hero} heard a sound and found a {animal} {where} the {spot}.",
                    "A small {animal} was sitting {where} the {spot}."}},
    {"hurt", {"The {animal} had hurt its leg and could not walk.",
              "The poor {animal} was cold and hungry.",
              "\"Help me,\" said the {animal}, \"I cannot find my home.\""}},
    {"take care", {"{Hero} picked up the {animal} and took it home.",
                   "{She} put the {animal} in a box and carried it to {her} {adult}.",
                   "\"Do not be afraid, little {animal},\" said {hero}."}},
    {"feed", {"{She} gave the {animal} some {food} and a warm bed.",
              "{Her} {adult} gave it some {food} to eat.",
              "The {animal} ate all the {food} and fell asleep."}},
    {"heals", {"After a few days, the {animal} was well again.",
               "Soon the {animal} was strong and could jump.",
               "Each day, the {animal} got better."}},
    {"let go", {"{Hero} took it back to the {place} and said goodbye.",
                "Then the {animal} went back to its home near the {place}.",
                "{She} opened the door, and the {animal} ran back to the {place}."}},
    {"animal returns", {"One {day} morning, the {animal} came back with a {look} {thing}.",
                        "A week later, the {animal} was at the door with a {look} {thing}.",
                        "The next day, {hero} found a {look} {thing} {where} the {spot}, and the {animal} sat next to it."}},
    {"for you", {"\"It is for you, {hero},\" said the {animal}.",
                 "The {animal} gave the {thing} to {hero}.",
                 "\"You were so good to me,\" said the {animal}."}},
    {"end animal", {"{Hero} and the {animal} were friends from that day on.",
                    "{Hero} kept the {look} {thing} and never forgot the little {animal}.",
                    "{She} learned that a good deed comes back to you."}},

    /* a swap */
    {"friend owns", {"{Friend} had a {flook} {fthing}.",
                     "{Her} friend {friend} had a {flook} {fthing} with a bow on it.",
                     "Next door lived {friend}, who had a {flook} {fthing}."}},
    {"admire", {"{Hero} thought that the {flook} {fthing} was the best toy of all.",
                "One {day} day at the {place}, {hero} saw the {flook} {fthing}.",
                "\"I like your {flook} {fthing},\" {she} said to {friend}."}},
    {"offer", {"\"Will you swap your {fthing} for my {thing}?\" asked {hero}.",
               "\"You can have my {look} {thing} for your {flook} {fthing},\" said {hero}.",
               "{Friend} looked at the {look} {thing} and asked, \"Do you want to swap?\""}},
    {"swap", {"So {hero} gave {friend} the {look} {thing} and got the {flook} {fthing}.",
              "{Friend} took the {look} {thing}, and {hero} took the {flook} {fthing}.",
              "They were both {glad} and swapped the {thing} for the {fthing}."}},
    {"miss it", {"That night, {hero} missed {her} {look} {thing}.",
                 "At home, {hero} looked at the {flook} {fthing} and was {sad}.",
                 "\"Where is your {look} {thing}?\" asked {her} {adult}."}},
    {"friend misses", {"{Friend} missed {fher} {flook} {fthing} too.",
                       "In {fher} bed, {friend} thought about the {flook} {fthing}.",
                       "{Friend} could not sleep without {fher} {fthing}."}},
    {"swap back", {"The next day, {friend} gave back the {look} {thing}, and {hero} gave back the {flook} {fthing}.",
                   "In the morning, they met at the {place} and swapped the {fthing} for the {thing} again.",
                   "\"Let us swap back,\" said {hero}, and {friend} gave {him} the {look} {thing}."}},
    {"end swap", {"{Hero} knew that the {look} {thing} was the best toy for {him}.",
                  "Now they play with the {thing} and the {fthing} together.",
                  "From that day on, {hero} loved {her} {look} {thing} even more."}},

    /* a birthday */
    {"birthday", {"It was the birthday of {friend}, and {hero} wanted to give {fhim} something nice.",
                  "One {day} day, {friend} said, \"Tomorrow is my birthday.\"",
                  "Soon {friend} would have a birthday party at the {place}."}},
    {"told wish", {"{Friend} wanted a {look} {thing} more than anything.",
                   "\"I would love to have a {look} {thing},\" said {friend}.",
                   "{Hero} knew that {friend} dreamed of a {look} {thing}."}},
    {"no gift", {"But {hero} had no money for a gift.",
                 "{Hero} went to the {faraway}, but there was no {thing}.",
                 "{She} looked and looked, but {she} could not find a {thing}."}},
    {"idea", {"Then {she} had a good idea.",
              "{Her} {adult} said, \"We can make one.\"",
              "\"I will make a {thing} for {friend},\" said {hero}."}},
    {"make gift", {"{Hero} and {her} {adult} made a {look} {thing} out of wood and paper.",
                   "{She} worked all night to make a {look} {thing}.",
                   "With the help of {her} {adult}, {hero} made a {look} {thing}."}},
    {"party", {"At the party, they all ate {food} and played games.",
               "The next day, {hero} went to the party at the {place}.",
               "All the friends came to the {place}, and there was {food} for all."}},
    {"unwrap", {"{Friend} opened the box and saw the {look} {thing}.",
                "\"It is a {look} {thing},\" shouted {friend}.",
                "{Hero} gave {friend} the {look} {thing}, and {fshe} smiled."}},
    {"end birthday", {"It was the best gift of all, because {hero} had made it.",
                      "{Friend} kept the {look} {thing} next to {fher} bed.",
                      "\"Thank you, {hero},\" said {friend}, \"you are a good friend.\"",
                      "{Hero} was {glad} because {friend} was {glad}."}},

    /* the truth */
    {"adult owns", {"{Her} {adult} had a {look} {thing} that nobody could touch.",
                    "On a table in the house stood a {look} {thing}.",
                    "{Her} {adult} loved a {look} {thing} that was very old."}},
    {"take", {"One {day} day, {hero} took the {thing} and played with it.",
              "{Hero} wanted to see the {look} {thing} and picked it up.",
              "When {her} {adult} was at the {place}, {hero} played with the {look} {thing}."}},
    {"drop", {"It fell from {her} hands and broke.",
              "All at once, the {look} {thing} fell to the ground.",
              "There was a loud crack, and the {thing} was broken."}},
    {"hide", {"{She} was afraid and hid the {thing} {where} the {spot}.",
              "{Hero} ran out of the house and put it {where} the {spot}.",
              "\"I will hide it {where} the {spot},\" {she} thought."}},
    {"adult asks", {"\"Where is my {look} {thing}?\" asked {her} {adult}.",
                    "{Her} {adult} came home and looked for the {look} {thing}.",
                    "Soon {her} {adult} saw that the {thing} was gone."}},
    {"blame", {"{Hero} said that {she} did not know.",
               "\"Maybe the {animal} took it,\" said {hero}.",
               "{Hero} looked down and did not say a word."}},
    {"confess", {"But {she} felt {sad} and told {her} {adult} the truth.",
                 "\"I broke it, and it is {where} the {spot},\" said {hero} at last.",
                 "Then {hero} took {her} {adult} to the {spot} and showed {ahim} the {thing}."}},
    {"forgive", {"\"Thank you for the truth,\" said {her} {adult}.",
                 "{Her} {adult} was not angry and gave {him} a hug.",
                 "{Her} {adult} smiled, because {ashe} loved {hero} more than the {thing}."}},
    {"fix", {"They fixed the {look} {thing} together.",
             "{Hero} and {her} {adult} fixed the {thing} with some glue.",
             "{Hero} helped to fix the {look} {thing}, and soon it was as good as new."}},
    {"end truth", {"From that day on, {hero} always told the truth.",
                   "{Hero} learned that it is better to tell the truth.",
                   "After that, {she} asked before {she} touched the {look} {thing}."}},

    /* a treasure */
    {"map", {"One {day} day, {hero} found an old map {where} the {spot}.",
             "One day, a {animal} gave {him} an old map.",
             "In an old book, {hero} found a map of the {faraway}."}},
    {"map says", {"The map said that there was a treasure at the {faraway}.",
                  "On the map was a big red cross near the {faraway}.",
                  "\"There is a treasure at the {faraway},\" said {hero}."}},
    {"tell friend", {"{She} showed the map to {friend}.",
                     "{Hero} asked {her} friend {friend} to come along.",
                     "\"Come with me,\" {she} said to {friend}."}},
    {"journey", {"They walked past the {place} and over a hill.",
                 "The road was long, but {friend} had some {food} in {fher} bag.",
                 "{Hero} and {friend} walked all day to get to the {faraway}."}},
    {"tired", {"{Friend} was tired and wanted to go home.",
               "Then it began to rain, and they were {sad}.",
               "They could not find the way and asked a {animal}."}},
    {"go on", {"\"We are almost there,\" said {hero}.",
               "But {hero} did not give up.",
               "They ate some {food} and went on."}},
    {"dig", {"At the {faraway}, they dug a deep hole.",
             "Then {friend} saw a box in the ground at the {faraway}.",
             "They dug and dug, and at last they hit a box."}},
    {"treasure", {"In the box was a {look} {thing}.",
                  "{Hero} opened the box and found a {look} {thing}.",
                  "\"It is a {look} {thing},\" shouted {friend}."}},
    {"end treasure", {"They took the {look} {thing} home and showed it to the {adult} of {hero}.",
                      "{Hero} and {friend} kept the {look} {thing} and the old map.",
                      "{Hero} said, \"The best treasure is a friend, {friend}.\""}},

    /* a sound at night */
    {"night", {"One {day} night, {hero} lay in bed with {her} {look} {thing}.",
               "It was late, and {hero} went to bed.",
               "{Hero} was in bed, and the house was dark."}},
    {"sound", {"Then {she} heard a strange sound {where} the {spot}.",
               "There was a noise outside, {where} the {spot}.",
               "Something moved outside, and {hero} sat up."}},
    {"afraid", {"\"Is it a monster?\" asked {hero}.",
                "{She} was afraid and held {her} {look} {thing} tight.",
                "{Hero} hid under the bed with the {thing}."}},
    {"call", {"{She} called {her} {adult}, and {ashe} came at once.",
              "\"Please come,\" called {hero}, and {her} {adult} came.",
              "{Her} {adult} came with a light in {aher} hand."}},
    {"look out", {"They went out to look {where} the {spot}.",
                  "\"Let us go and see,\" said {her} {adult}.",
                  "{Hero} took the hand of {her} {adult}, and they went to the {spot}."}},
    {"only", {"It was not a monster, it was only a {animal}.",
              "A little {animal} sat {where} the {spot} and looked at them.",
              "There was a {animal} {where} the {spot}, and it was afraid too."}},
    {"laugh", {"{Hero} laughed and gave the {animal} some {food}.",
               "\"You are not a monster, little {animal},\" said {hero}.",
               "{Her} {adult} laughed, and {hero} laughed too."}},
    {"end night", {"After that, {hero} was not afraid of the dark.",
                   "Then {hero} went back to bed with {her} {thing} and slept well.",
                   "From that night on, the {animal} came to see {hero} every day.",
                   "{Hero} learned that {she} could be brave."}},

    /* a sick one at home */
    {"sick", {"One {day} day, {her} {adult} was sick and had to stay in bed.",
              "One morning, {her} {adult} did not feel well.",
              "{Her} {adult} had a cold and lay in bed with a {look} blanket."}},
    {"help plan", {"{Hero} wanted to make some {food} for {ahim}.",
                   "\"I will make you some {food},\" said {hero}.",
                   "{Hero} thought that some {food} would help."}},
    {"fetch", {"{She} took a {look} basket and went to the {place}.",
               "But there was nothing in the house, so {she} ran to the {place}.",
               "{Hero} went to the {place} to get what {she} needed."}},
    {"too heavy", {"On the way back, the bag was too heavy for {him}.",
                   "Then {hero} fell, and all of it rolled {where} the {spot}.",
                   "On the way home, it began to rain."}},
    {"friend helps", {"{Friend} saw it and helped {him} carry the bag.",
                      "\"I will help you,\" said {friend}, who was very {ftrait}.",
                      "A {ftrait} {fkind} named {friend} came and helped {him}."}},
    {"cook", {"{Hero} and {friend} made the {food} together.",
              "At home, they made some {food}, and it smelled so good.",
              "{Friend} knew how to make {food}, and {hero} helped."}},
    {"eat", {"{Her} {adult} ate the {food} and smiled.",
             "\"This {food} is so good,\" said {her} {adult}.",
             "{Hero} brought the {food} to {her} {adult}, and {ashe} ate it all."}},
    {"well again", {"The next day, {her} {adult} was well again.",
                    "Soon {her} {adult} felt much better and got out of bed.",
                    "After the {food}, {ashe} felt strong again."}},
    {"end sick", {"{Her} {adult} gave {hero} and {friend} a big hug.",
                  "{Hero} was {glad} because {she} could help {her} {adult}.",
                  "To say thank you, {ashe} made some {food} for {hero} and {friend}."}},
};
enum { BEATS = sizeof beats / sizeof beats[0] };

/* ---- plots: beats separated by commas; one with a ? is left out half of the time; | begins a new paragraph */

typedef struct {
    const char *name, *beats;
} Plot;

static const Plot plots[] = {
    {"lost and found", "opening, likes?, owns | go, meet?, play?, lost, cry?, search, advice, found | thank animal, end lost"},
    {"sharing", "opening, owns | go, meet, friend wants, refuse, friend sad, alone, adult says share?, share | play together, end share"},
    {"a wish", "opening, likes?, friends?, wants | no money, magic, make wish, sleep?, morning box, open box | show friend, end wish"},
    {"a storm", "opening, owns | go, storm, blown, run home, comfort?, after storm, knock, friend brings | thank friend, end storm"},
    {"a quarrel", "opening, likes?, friends | find toy, mine, pull, breaks, part, regret, make up | mend together, end quarrel"},
    {"learning", "opening, cannot | try, fail, teacher, teach, practice, can | show adult?, end learn"},
    {"an animal", "opening, likes? | walk, see animal, hurt, take care, feed, heals, let go | animal returns, for you?, end animal"},
    {"a swap", "opening, owns, friend owns | admire, offer, swap, miss it, friend misses?, swap back | end swap"},
    {"a birthday", "opening, likes?, friends | birthday, told wish, no gift, idea?, make gift, party?, unwrap | end birthday"},
    {"the truth", "opening, likes?, adult owns | take, drop, hide, adult asks, blame?, confess, forgive | fix, end truth"},
    {"a treasure", "opening, likes? | map, map says, tell friend, journey, tired?, go on?, dig, treasure | end treasure"},
    {"a sound at night", "opening, likes?, owns | night, sound, afraid, call, look out, only | laugh, end night"},
    {"a sick one at home", "opening, likes? | sick, help plan, fetch, too heavy?, friend helps, cook, eat | well again, end sick"},
};
enum { PLOTS = sizeof plots / sizeof plots[0] };

#endif
